"""The order, the loader and the cache against Streaming: `python -m launch.experiments.bench.data`.

start: seconds and memory until the first batch, anywhere in yamls/mixtures/12t.yaml, including reading shard
indexes, which Streaming's side does not do. loader: tokens per second, one worker. fetches: a simulated epoch
on 64 nodes. shuffle: quality of the order. resume: random positions in five phases with other world sizes.
Shards are synthetic, in a temporary folder.
"""

import datetime
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict

from tqdm import tqdm

from launch.experiments.bench.data.fetches import fetches
from launch.experiments.bench.data.figures import Figure, table
from launch.experiments.bench.data.resume_anywhere import resume
from launch.experiments.bench.data.shuffle import shuffle
from launch.experiments.bench.data.speed import speed
from launch.experiments.bench.data.start import start
from train.layout.device import describe_hardware
from train.record.command import Figures, command
from train.record.provenance import git_commit

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "start": start,
    "loader": speed,
    "fetches": fetches,
    "shuffle": shuffle,
    "resume": resume,
}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"], help="default: all")


@command("python -m launch.experiments.bench.data", __doc__, add_arguments, json="write the figures")
def main(options: Namespace) -> Figures:
    """Runs the benchmark; status 1 if a goal is missed."""
    parts = [part for part in PARTS if options.part in (part, "all")]
    figures = [figure for part in tqdm(parts, desc="parts") for figure in PARTS[part]()]
    where = {
        "hardware": describe_hardware("cpu"),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
    }
    print("\n".join([table(figures), "", *(f"{key}: {value}" for key, value in where.items())]))
    content = {"figures": [asdict(figure) for figure in figures], "machine": where}
    return Figures(content, 0 if all(figure.is_reached for figure in figures) else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
