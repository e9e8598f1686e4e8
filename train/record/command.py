"""Commands: options, one-line errors, Ctrl-C, figures as JSON and logging, the same for all.

A module defines its arguments and a function that does the work::

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("run", type=Path)

    @command("python -m train.report", "Writes a run's report.", add_arguments, json="also write the figures")
    def main(options: Namespace) -> Figures: ...

    if __name__ == "__main__":
        sys.exit(main(sys.argv[1:]))
"""

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from train.recipe.errors import JoinedUserError, UserError
from train.recipe.exit_status import INTERRUPTED_STATUS, USAGE_STATUS
from train.recipe.packages import left_out
from train.record import log
from train.record.files import write_json, write_whole

logger = log.get_logger("command")


@dataclass(frozen=True)
class Figures:
    """A command's results, for ``--json``, and its exit status."""

    tree: Any
    """Plain values, or JSON as text."""
    status: int = 0


Outcome = int | Figures
Work = Callable[[Namespace], Outcome]
Arguments = Callable[[ArgumentParser], object]


@dataclass(frozen=True)
class Command:
    """A command that can be called with its arguments and returns its exit status; see :func:`command`."""

    work: Work
    prog: str
    description: str
    arguments: Arguments
    json: str = ""
    file: str = ""
    name: str = ""
    mistakes: tuple[type[Exception], ...] = ()
    intermixed: bool = False
    epilog: str = ""

    def __call__(self, arguments: Sequence[str]) -> int:
        """Parses the arguments and does the work; returns the exit status."""
        parser = ArgumentParser(prog=self.prog, **self._texts())
        self.add_to(parser)
        parse = parser.parse_intermixed_args if self.intermixed else parser.parse_args
        return self.run(parse(arguments))

    def add_to(self, parser: ArgumentParser) -> None:
        """Adds the command's own options and those common to all commands."""
        self.arguments(parser)
        if self.json:
            parser.add_argument("--json", type=Path, metavar="FILE", help=self.json)
        messages = parser.add_argument_group("messages")
        messages.add_argument("--quiet", action="store_true", help="only warnings and errors")
        messages.add_argument("--json-logs", action="store_true", help="one JSON object per line")
        messages.add_argument("--timestamps", action="store_true", help="time and level before each line")

    def run(self, options: Namespace) -> int:
        """Does the work; returns the exit status: 2 for a user error, 130 after Ctrl-C, else the work's."""
        log.configure(quiet=options.quiet, as_json=options.json_logs, timestamps=options.timestamps)
        mistakes: tuple[type[Exception], ...] = (UserError, *self.mistakes)
        file = (getattr(options, self.file) or "command line") if self.file else ""
        try:
            for option in ("json", "html"):
                if (written := getattr(options, option, None)) is not None:
                    _require_writable(Path(written), f"--{option}")
            outcome = self.work(options)
            if isinstance(outcome, int):
                return outcome
            if options.json:
                write_figures(options.json, outcome.tree)
            return outcome.status
        except mistakes as error:
            for line in _lines(error, str(file)):
                logger.error(f"{self.name}: {line}" if self.name else line)
            return USAGE_STATUS
        except ModuleNotFoundError as error:
            package = left_out(error)
            if package is None:
                raise
            logger.error(f"{self.name or self.prog.split()[-1]}: {package}")
            return USAGE_STATUS
        except KeyboardInterrupt:
            logger.error(f"{self.name or self.prog.split()[-1]}: interrupted")
            return INTERRUPTED_STATUS

    def _texts(self) -> dict[str, Any]:
        raw = {"formatter_class": RawDescriptionHelpFormatter}
        is_laid_out = "\n" in self.description + self.epilog
        texts = {"description": self.description, "epilog": self.epilog or None}
        return texts | (raw if is_laid_out else {})


def add_recipe_arguments(
    parser: ArgumentParser,
    default: str | None = None,
    *,
    example: str = "yamls/dbrx.yaml",
    needed: bool = True,
) -> None:
    """Adds ``recipe``, a YAML file, and ``overrides`` of it.

    Args:
        parser: of the command.
        default: recipe without one on the command line.
        example: recipe that the help names if there is no default.
        needed: without a default, whether the command must have a recipe.
    """
    optional: dict[str, Any] = {} if needed and default is None else {"nargs": "?", "default": default}
    # Not %(default)s, which parse_intermixed_args takes from positional arguments.
    what = f"for example {example}" if default is None else f"default {default}"
    parser.add_argument("recipe", help=f"YAML file, {what}", **optional)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides the file")


def command(
    prog: str,
    description: str,
    arguments: Arguments,
    *,
    json: str = "",
    file: str = "",
    name: str = "",
    mistakes: tuple[type[Exception], ...] = (),
    intermixed: bool = False,
    epilog: str = "",
) -> Callable[[Work], Command]:
    """Makes a command from the function that does its work.

    Args:
        prog: command line, for the help.
        description: for the help.
        arguments: adds the command's arguments to a parser.
        json: help text of ``--json FILE``, if the function returns :class:`Figures`; empty: no such option.
        file: argument whose value is named as the file of an error that names none itself.
        name: prefix of an error's line.
        mistakes: exceptions to report as user errors, besides :class:`UserError`.
        intermixed: allow options between positional arguments.
        epilog: for the help.
    """

    def decorate(work: Work) -> Command:
        return Command(work, prog, description, arguments, json, file, name, mistakes, intermixed, epilog)

    return decorate


@dataclass(frozen=True)
class CommandGroup:
    """Commands under one name, such as ``python -m train.tracking upload``."""

    prog: str
    description: str
    commands: Mapping[str, Command]

    def __call__(self, arguments: Sequence[str]) -> int:
        """Parses the arguments and runs the command that they name; returns the exit status."""
        parser = ArgumentParser(prog=self.prog, description=self.description)
        parsers = parser.add_subparsers(dest="chosen_command", metavar="COMMAND", required=True)
        for name, each in self.commands.items():
            each.add_to(parsers.add_parser(name, help=each.description, prog=each.prog, **each._texts()))
        options = parser.parse_args(arguments)
        return self.commands[options.chosen_command].run(options)


def at_least(kind: type, least: float) -> Callable[[str], Any]:
    """Returns the type of an argument: a finite number, ``int`` or ``float``, of at least ``least``."""

    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def _require_writable(file: Path, key: str) -> None:
    """Raises if a file that a command writes at its end can't be written; leaves nothing behind."""
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is not a folder", key=key, remedy="create it first")
    if file.is_dir():
        raise UserError(f"{file} is a folder", key=key, remedy="give a file")
    try:
        with NamedTemporaryFile(prefix=".writable-", dir=file.parent):
            pass
    except OSError as error:
        what = f"{file} can't be written ({error.strerror})"
        raise UserError(what, key=key, remedy="give a file in a folder that you may write to") from None


def write_figures(file: Path, tree: Any) -> None:
    """Writes the figures for ``--json``, atomically.

    Raises:
        UserError: if the file can't be written.
    """
    try:
        if isinstance(tree, str):
            write_whole(file, tree)
        else:
            write_json(file, tree)
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror})", key="--json") from None


def _lines(error: Exception, file: str) -> list[str]:
    """Formats an exception, in one line for each mistake."""
    if not isinstance(error, UserError):
        return [_line(error)]
    found = error.at(file)
    return [str(each) for each in (found.errors if isinstance(found, JoinedUserError) else (found,))]


def _line(error: Exception) -> str:
    """Formats an exception in one line; system errors without their number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
