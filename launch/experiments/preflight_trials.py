"""How well the preflight's links are judged: `python -m launch.experiments.preflight_trials RECIPE.yaml`.

Each of several forked ranks in turn is slowed down, and must be named; between these trials nobody is slowed
down, and nobody may be named.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from launch.verify.forked_ranks import run_ranks
from train.preflight.links import measure_links
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.topology import Topology

DELAY_SECONDS = 0.03
"""How much later the slow rank sends each message."""
TRIAL_SECONDS = 60.0


@dataclass(frozen=True)
class Trial:
    """One measurement of all links."""

    slow: int | None
    """The rank that was slowed down; None: nobody was."""
    named: list[int]
    """Ranks that were called slow."""
    pairs: list[tuple[int, int]]
    """Pairs of other ranks that were called slow."""
    milliseconds: float
    """Median link of ranks that were not named, there and back."""
    seconds: float
    """The whole measurement."""
    load: float
    """Processes that wanted to run on this machine in the last minute."""

    @property
    def has_passed(self) -> bool:
        """Whether the slow rank was named, and nobody else."""
        return self.named == ([] if self.slow is None else [self.slow]) and not self.pairs


def try_ranks(world: int, trials: int, factor: float) -> Iterator[Trial]:
    """Measures forked ranks, in turn without and with a slow one, ``trials`` times each."""

    def work(topology: Topology) -> list[Trial]:
        send, found = dist.send, []

        def late(tensor: torch.Tensor, dst: int) -> None:
            time.sleep(DELAY_SECONDS)
            send(tensor, dst)

        for number in range(2 * trials):
            slow = number // 2 % world if number % 2 else None
            begun = time.perf_counter()
            with mock.patch.object(dist, "send", late if topology.rank == slow else send):
                links = measure_links(torch.device("cpu"), factor)
            usual, took, load = 1e3 * links.usual, time.perf_counter() - begun, os.getloadavg()[0]
            found.append(Trial(slow, links.slow_ranks, links.slow_pairs, usual, took, load))
        return found

    yield from run_ranks(world, work, timeout_seconds=2 * trials * TRIAL_SECONDS)[0]


def run_trials(world: int, trials: int, factor: float, json_file: str | None) -> int:
    """Tries, prints a table; returns the exit status (1: a slow rank was missed or a healthy one accused)."""
    found = list(try_ranks(world, trials, factor))
    for number, trial in enumerate(found):
        done = "nobody" if trial.slow is None else f"rank {trial.slow}"
        said = ", ".join([*(f"rank {rank}" for rank in trial.named), *(f"pair {p}" for p in trial.pairs)])
        print(
            f"trial {number + 1:3d}  slowed {done:<8} named {said or 'nobody':<10} link "
            f"{trial.milliseconds:7.2f} ms  {trial.seconds:5.1f} s  load {trial.load:4.1f}  "
            f"{'pass' if trial.has_passed else 'FAIL'}"
        )
    slowed = [trial for trial in found if trial.slow is not None]
    healthy = [trial for trial in found if trial.slow is None]
    print(
        f"the slow rank and nobody else was named in {sum(t.has_passed for t in slowed)} of {len(slowed)} "
        f"trials; nobody was named in {sum(t.has_passed for t in healthy)} of {len(healthy)} healthy ones"
    )
    if json_file:
        Path(json_file).write_text(json.dumps([asdict(trial) for trial in found], indent=1))
    return 0 if all(trial.has_passed for trial in found) else 1


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (1: a trial has failed, 2: a mistake of the user)."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.experiments.preflight_trials", description=__doc__
    )
    parser.add_argument("recipe", help="YAML file; its preflight.slow_factor is tried")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="at least 3 (default: 4)")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="of each kind (default: 20)")
    parser.add_argument("--json", metavar="FILE", help="write every trial as JSON too")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.trials < 1 or options.ranks < 3:
            what = f"{options.trials} trials with {options.ranks} ranks tell nothing"
            raise UserError(what, key="--trials", remedy="give at least 1, with --ranks 3 or more")
        recipe = load_recipe(options.recipe, options.overrides)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS
    return run_trials(options.ranks, options.trials, recipe.preflight.slow_factor, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
