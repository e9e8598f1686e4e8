"""Accuracy of preflight's link test: `python -m launch.experiments.preflight_trials RECIPE.yaml`.

Forked ranks are slowed down one at a time, and the slow one must be named; in the trials in between, no rank
is slow, and none may be named.
"""

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from launch.verify.forked_ranks import run_ranks
from train.preflight import links
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.topology import Topology
from train.record.command import Figures, add_recipe_arguments, command
from train.record.tables import text_table

DELAY_SECONDS = 0.03
"""Delay of each message that the slow rank sends."""
TRIAL_SECONDS = 60.0


@dataclass(frozen=True)
class LinkTrial:
    """One measurement of all links."""

    slow: int | None
    """The slowed rank, if any."""
    named: list[int]
    """Ranks that preflight called slow."""
    pairs: list[tuple[int, int]]
    """Pairs of other ranks that preflight called slow."""
    milliseconds: float
    """Median round trip between ranks that were not named."""
    seconds: float
    """Duration of the whole measurement."""
    load: float
    """Load average of this machine over the last minute."""

    @property
    def has_passed(self) -> bool:
        """True if the slow rank was named, and no other."""
        return self.named == ([] if self.slow is None else [self.slow]) and not self.pairs


def try_ranks(world: int, trials: int, factor: float) -> Iterator[LinkTrial]:
    """Measures forked ranks, alternately without and with a slow one, ``trials`` times each."""

    def work(topology: Topology) -> list[LinkTrial]:
        send, found = links.send, []

        def late(*message: Any) -> None:
            time.sleep(DELAY_SECONDS)
            send(*message)

        for number in range(2 * trials):
            slow = number // 2 % world if number % 2 else None
            begun = time.perf_counter()
            with mock.patch.object(links, "send", late if topology.rank == slow else send):
                measured = links.measure_links(torch.device("cpu"), factor)
            usual, took, load = 1e3 * measured.usual, time.perf_counter() - begun, os.getloadavg()[0]
            found.append(LinkTrial(slow, measured.slow_ranks, measured.slow_pairs, usual, took, load))
        return found

    yield from run_ranks(world, work, timeout_seconds=2 * trials * TRIAL_SECONDS)[0]


def run_trials(world: int, trials: int, factor: float) -> Figures:
    """Runs the trials and prints a table; status 1: a slow rank was missed or a healthy one named."""
    found = list(try_ranks(world, trials, factor))
    heads = ("trial", "slowed", "named", "link", "took", "load", "")
    print(text_table(heads, map(_cells, range(1, len(found) + 1), found), "><<>>><"))
    slowed = [trial for trial in found if trial.slow is not None]
    healthy = [trial for trial in found if trial.slow is None]
    print(
        f"the slow rank, and no other, was named in {sum(t.has_passed for t in slowed)} of {len(slowed)} "
        f"trials; no rank was named in {sum(t.has_passed for t in healthy)} of {len(healthy)} healthy ones"
    )
    return Figures([asdict(trial) for trial in found], 0 if all(trial.has_passed for trial in found) else 1)


def _cells(number: int, trial: LinkTrial) -> tuple[object, ...]:
    slowed = "none" if trial.slow is None else f"rank {trial.slow}"
    named = ", ".join([*(f"rank {rank}" for rank in trial.named), *(f"pair {p}" for p in trial.pairs)])
    figures = (f"{trial.milliseconds:.2f} ms", f"{trial.seconds:.1f} s", f"{trial.load:.1f}")
    return number, slowed, named or "none", *figures, "pass" if trial.has_passed else "FAIL"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="at least 3 (default: 4)")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="of each kind (default: 20)")


@command(
    "python -m launch.experiments.preflight_trials",
    __doc__,
    add_arguments,
    json="write every trial as JSON too",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Runs the trials; status 1: a trial has failed."""
    if options.trials < 1 or options.ranks < 3:
        what = f"{options.trials} trials with {options.ranks} ranks show nothing"
        raise UserError(what, key="--trials", remedy="give at least 1, with --ranks 3 or more")
    recipe = load_recipe(options.recipe, options.overrides)
    return run_trials(options.ranks, options.trials, recipe.preflight.slow_factor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
