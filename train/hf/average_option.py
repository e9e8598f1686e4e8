"""The option by which commands read an average of a run's weights; needs no torch."""

from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import dataclass

OPTION = "--average"


@dataclass(frozen=True)
class Average:
    """An average of a run's weights."""

    last: int | None
    """The mean of so many checkpoints; None: the exponential average of one."""

    def __str__(self) -> str:
        return "ema" if self.last is None else f"last:{self.last}"


def add_average(parser: ArgumentParser) -> None:
    """Adds the option, whose value is an :class:`Average` or None."""
    parser.add_argument(
        OPTION,
        type=parse_average,
        metavar="ema|last:N",
        help="of a run, instead of its weights: their exponential average (optimizer.average_decay), or the "
        "mean of the last N complete checkpoints",
    )


def parse_average(text: str) -> Average:
    """Reads `ema` or `last:N`.

    Raises:
        ArgumentTypeError: for anything else.
    """
    kind, _, number = text.partition(":")
    if text == "ema":
        return Average(None)
    if kind != "last" or not number.isdecimal() or int(number) < 2:
        raise ArgumentTypeError("must be ema, or last:N with N at least 2")
    return Average(int(number))
