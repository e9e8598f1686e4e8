"""The order, the loader and the cache against Streaming: `python -m launch.experiments.bench.data`.

start: seconds and memory until the first batch, anywhere in yamls/mixtures/12t.yaml, with the indexes of its
shards, which are left out on Streaming's side. loader: tokens a second, one worker. fetches: a simulated
epoch on 64 nodes. shuffle: quality of the order. resume: random places of five phases on other worlds.
Shards are synthetic, in a temporary folder that is removed.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from launch.experiments.bench.data.fetches import fetches
from launch.experiments.bench.data.figures import Figure, table
from launch.experiments.bench.data.resume_anywhere import resume
from launch.experiments.bench.data.shuffle import shuffle
from launch.experiments.bench.data.speed import speed
from launch.experiments.bench.data.start import start
from train.layout.device import describe_hardware
from train.record.provenance import git_commit

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "start": start,
    "loader": speed,
    "fetches": fetches,
    "shuffle": shuffle,
    "resume": resume,
}


def main(arguments: list[str]) -> int:
    """Runs the command line; exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m launch.experiments.bench.data", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"], help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if options.part in (part, "all")]
    figures = [figure for part in tqdm(parts, desc="parts") for figure in PARTS[part]()]
    where = {
        "hardware": describe_hardware("cpu"),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
    }
    print("\n".join([table(figures), "", *(f"{key}: {value}" for key, value in where.items())]))
    if options.json:
        content = {"figures": [asdict(figure) for figure in figures], "machine": where}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(figure.is_reached for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
