"""Mutation testing: `python -m launch.experiments.mutation --mutants 10 --out mutants.jsonl`.

Faults are planted in a copy of the source, one at a time (:mod:`launch.experiments.mutants`), and the test
files that run the changed line are run until one fails. A mutant that passes them all survives: a test is
missing, or the change makes no difference. Which lines each test file runs is found out first, and kept. The
same command continues what was interrupted.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.experiments.mutants import Mutant, mutants_of
from launch.experiments.seen_lines import SEEN_VARIABLE, read_seen
from train.recipe.errors import UserError
from train.record.command import Figures, at_least, command
from train.record.files import write_json
from train.record.tables import text_table

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("train/model", "train/step", "train/layout", "data/order")
LEAST_SECONDS = 60.0
"""A test file of a mutant has this long, and more if it takes long without it."""
LONGER = 4.0
KILLED, TIMEOUT, SURVIVED, UNSEEN = "killed", "timeout", "survived", "no test"


@dataclass(frozen=True)
class Tests:
    """A test file without any mutant."""

    seconds: float
    lines: dict[str, list[int]]
    """Lines that it runs, by file."""


@dataclass(frozen=True)
class TriedMutant:
    """A mutant and the verdict of the tests."""

    name: str
    folder: str
    status: str
    by: str
    """The test file that failed; empty if none did."""
    seconds: float


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--folders", nargs="+", default=list(FOLDERS), metavar="DIR", help="of the source")
    parser.add_argument("--mutants", type=at_least(int, 1), default=10, metavar="N", help="per folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    parser.add_argument(
        "--tests", nargs="+", default=[], metavar="FILE", help="test files besides those of the folders"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="one line per mutant; those that are there are not run again",
    )


@command(
    "python -m launch.experiments.mutation",
    "Plants faults in a copy of the source and counts those that tests notice. Takes minutes for each.",
    add_arguments,
    json="also write the scores and all outcomes as JSON",
)
def main(options: Namespace) -> Figures:
    """Runs what is left of the sample; prints scores and survivors."""
    if sys.version_info < (3, 12):
        raise UserError("needs Python 3.12 or newer", key="python", remedy="use another environment")
    folders = [folder.rstrip("/") for folder in options.folders]
    files = [file for folder in folders for file in test_files(folder)] + options.tests
    missing = [name for name in [*folders, *options.tests] if not (ROOT / name).exists()]
    if missing or not files:
        raise UserError(f"{', '.join(missing) or 'nothing'}: not there", key="--folders or --tests")
    out = Path(options.out).absolute()
    done = {outcome.name: outcome for outcome in read_outcomes(out)}
    outcomes = []
    with copied_source() as root:
        tests = map_tests(root, files, out.with_suffix(".map.json"))
        for folder in folders:
            for mutant in sample(folder, options.mutants, options.seed):
                outcome = done.get(mutant.name) or run_mutant(root, folder, mutant, tests)
                if mutant.name not in done:
                    with out.open("a") as stream:
                        stream.write(json.dumps(asdict(outcome)) + "\n")
                    by = f" by {outcome.by}" if outcome.by else ""
                    print(f"{outcome.status}{by}: {outcome.name}", flush=True)
                outcomes.append(outcome)
    print(table_of(folders, outcomes))
    for outcome in outcomes:
        if outcome.status in (SURVIVED, UNSEEN):
            print(f"{outcome.status}: {outcome.name}")
    return Figures([asdict(outcome) for outcome in outcomes])


def test_files(folder: str) -> list[str]:
    """Returns the test files of a folder of the source."""
    return sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / folder).rglob("test_*.py"))


def sample(folder: str, count: int, seed: int) -> list[Mutant]:
    """Draws mutants of a folder; a larger sample of the same seed contains the smaller one."""
    files = sorted((ROOT / folder).rglob("*.py"))
    mutants = [mutant for file in files for mutant in mutants_of(file, ROOT)]
    random.Random(f"{seed}/{folder}").shuffle(mutants)
    return mutants[:count]


def read_outcomes(out: Path) -> list[TriedMutant]:
    """Reads the outcomes so far; a line that was cut off is passed over."""
    outcomes = []
    for line in out.read_text().splitlines() if out.exists() else []:
        with suppress(ValueError):
            outcomes.append(TriedMutant(**json.loads(line)))
    return outcomes


@contextmanager
def copied_source() -> Iterator[Path]:
    """Copies all files that git would keep to a temporary folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder).resolve()
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        # Some tests ask for the commit.
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        yield root


def map_tests(root: Path, files: Sequence[str], kept: Path) -> dict[str, Tests]:
    """Runs every test file once and returns which lines it runs; a file that fails is left out with a word.

    Args:
        root: of the copied source.
        files: the test files.
        kept: a file with what earlier calls have found; those that are in it are not run again.
    """
    found = (
        {name: Tests(**each) for name, each in json.loads(kept.read_text()).items()} if kept.exists() else {}
    )
    for name in files:
        if name in found:
            continue
        with tempfile.TemporaryDirectory(prefix="seen-") as folder:
            begun = time.monotonic()
            status = run_tests(root, name, None, {SEEN_VARIABLE: folder})
            lines = read_seen(Path(folder)) if status == 0 else {}
        found[name] = Tests(round(time.monotonic() - begun, 1), lines)
        print(
            f"{name}: {found[name].seconds:.0f} s" if status == 0 else f"{name} FAILS: left out", flush=True
        )
        write_json(kept, {each: asdict(tests) for each, tests in found.items()}, sync=False)
    return {name: found[name] for name in files if found[name].lines}


def run_mutant(root: Path, folder: str, mutant: Mutant, tests: dict[str, Tests]) -> TriedMutant:
    """Runs the test files that run a mutant's line, the quickest first, until one fails."""
    begun = time.monotonic()
    target = root / mutant.file
    source = target.read_bytes()
    running = [name for name, each in tests.items() if mutant.line in each.lines.get(mutant.file, [])]
    status, by = (SURVIVED if running else UNSEEN), ""
    target.write_bytes(mutant.applied_to(source))
    try:
        for name in sorted(running, key=lambda each: tests[each].seconds):
            code = run_tests(root, name, max(LEAST_SECONDS, LONGER * tests[name].seconds), {})
            if code != 0:
                status, by = (TIMEOUT if code is None else KILLED), name
                break
    finally:
        target.write_bytes(source)
    return TriedMutant(mutant.name, folder, status, by, round(time.monotonic() - begun, 1))


def run_tests(root: Path, name: str, seconds: float | None, variables: dict[str, str]) -> int | None:
    """Runs a test file until its first failure; returns pytest's exit status, None if it took too long."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n0", name]
    words += ["-p", "launch.experiments.seen_lines"] if variables else []
    # Without it Python would take the compiled file of a change within the same second.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)} | variables
    process = subprocess.Popen(
        words,
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table_of(folders: Sequence[str], outcomes: Sequence[TriedMutant]) -> str:
    """Formats the score of each folder: mutants that tests notice over all."""
    rows = []
    for folder in folders:
        of_folder = [outcome.status for outcome in outcomes if outcome.folder == folder]
        killed = sum(status in (KILLED, TIMEOUT) for status in of_folder)
        share = f"{killed / len(of_folder):.0%}" if of_folder else "-"
        rows.append((folder, len(of_folder), killed, share))
    return text_table(("folder", "mutants", "killed", "score"), rows, "<>>>")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
