"""Speed of cleaning, stage by stage, and datatrove's: `python -m launch.experiments.bench.stages`.

All sides read the same documents of the installed corpus and alternate; a figure is the ratio of medians of
the process' own CPU time. `as before` is cleaning with MinHash by datasketch, of 128 values, as it was up to
commit 2fbc829. datatrove runs in its own interpreter, `--datatrove PYTHON`, of an environment made by
`pip install datatrove nltk spacy tokenizers orjson "xxhash<4"`; without it, its column is empty.
"""

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from data.text import clean as cleaning
from data.text.duplicates import PERMUTATIONS, SHINGLE_WORDS, SKETCH, sketch
from data.text.inputs import Chunk, SourceFile
from data.text.installed import installed_corpus
from data.text.job import PreparationJob
from data.text.language import language_of
from data.text.quality import repetition_scores, word_scores
from data.text.words import hash_ngrams, hash_words
from train.layout.device import describe_hardware
from train.recipe.preparation import Preparation, Quality, Source, SourceKind
from train.recipe.schema import Tokenizer
from train.record.command import Figures, command
from train.record.provenance import git_commit
from train.record.tables import text_table

SHARED = ("MinHash", "quality", "repetition")
"""Stages that datatrove has too."""
_CHILD = "import sys; sys.path.append(sys.argv[1]); import datatrove_stages as it; it.main(sys.argv[2])"

Seconds = Callable[[], float]


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--megabytes", type=int, default=2, help="text per domain, at most (default 2)")
    parser.add_argument("--datatrove", metavar="PYTHON", help="an interpreter that has datatrove")


@command("python -m launch.experiments.bench.stages", __doc__, add_arguments, json="write the figures")
def main(options: Namespace) -> Figures:
    """Runs the benchmark and prints its table."""
    texts = [document.text for document in installed_corpus(options.megabytes * 1_000_000)]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), texts, options.rounds, options.datatrove)
    print(table(figures))
    return Figures(figures)


def measure(folder: Path, texts: Sequence[str], rounds: int, datatrove: str | None) -> dict[str, Any]:
    """Measures all sides in bytes per second of a core."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    sides: dict[str, Seconds] = {name: _over(texts, stage) for name, stage in stages().items()}
    sides |= {"cleaning": _cleaning(folder, texts), "cleaning, as before": _cleaning_before(folder, texts)}
    child = None
    if datatrove is not None:
        call = [datatrove, "-c", _CHILD, str(Path(__file__).parent), str(path)]
        child = subprocess.Popen(
            call,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        sides |= {f"datatrove, {name}": _asked(child, name) for name in SHARED}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):  # The first one warms up, and does not count.
        for name, side in sides.items():
            seconds[name].append(side())
    if child is not None:
        child.communicate()
    size = sum(len(text.encode()) for text in texts)
    return {
        "bytes_per_second": {name: size / statistics.median(it[1:]) for name, it in seconds.items()},
        "text_bytes": size,
        "documents": len(texts),
        "machine": {"hardware": describe_hardware("cpu"), "commit": git_commit()},
    }


def stages() -> dict[str, Callable[[str], object]]:
    """The stages of cleaning, each of a text."""
    return {
        "normalise": cleaning.normalise,
        "language": language_of,
        "quality": lambda text: word_scores(text, "en"),
        "repetition": repetition_scores,
        "MinHash": lambda text: sketch(hash_words(text)),
        "MinHash by datasketch": lambda text: sketch_by_datasketch(hash_words(text)),
        "SHA-256": lambda text: hashlib.sha256(text.encode()).digest(),
    }


def sketch_by_datasketch(words: np.ndarray[Any, Any], values: int = 128) -> np.ndarray[Any, Any]:
    """Computes a signature as it was computed before: a sketch [1] with some of the values."""
    from datasketch import MinHash

    shingles = np.unique(hash_ngrams(words, SHINGLE_WORDS).astype(np.uint32))
    made = MinHash(num_perm=values, hashfunc=int, permutations=_permutations(values), scheme="affine32")
    for start in range(0, shingles.size, 8192):
        made.update_batch(shingles[start : start + 8192].tolist())
    filled = np.zeros(1, SKETCH)
    filled["values"][0, : min(values, PERMUTATIONS)] = made.hashvalues[:PERMUTATIONS] & 255
    return filled


def _permutations(values: int, known: dict[int, Any] = {}) -> Any:  # noqa: B006
    from datasketch import MinHash

    if values not in known:
        known[values] = MinHash(num_perm=values).permutations
    return known[values]


def _over(texts: Sequence[str], stage: Callable[[str], object]) -> Seconds:
    def run() -> float:
        start = time.process_time()
        for text in texts:
            stage(text)
        return time.process_time() - start

    return run


def _cleaning(folder: Path, texts: Sequence[str]) -> Seconds:
    """The whole first stage: reading JSONL, filters of prose, hashes, sketches and files."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    facts = {"path": str(path), "dataset": "installed", "version": "", "origin": "", "licence": ""}
    source = Source("all", SourceKind.jsonl, quality=Quality.prose, **facts)  # type: ignore[arg-type]
    file = SourceFile(0, path.name, str(path), path.stat().st_size, 0)

    def run() -> float:
        work = folder / "work"
        job = PreparationJob(work, (source,), Preparation(), (), Tokenizer(), 16, False)
        start = time.process_time()
        cleaning.clean(job, Chunk(0, 0, (file,), 0, file.bytes))
        seconds = time.process_time() - start
        shutil.rmtree(work)
        return seconds

    return run


def _cleaning_before(folder: Path, texts: Sequence[str]) -> Seconds:
    whole = _cleaning(folder, texts)

    def run() -> float:
        with patch.object(cleaning, "sketch", sketch_by_datasketch):
            return whole()

    return run


def _asked(child: "subprocess.Popen[str]", stage: str) -> Seconds:
    def run() -> float:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(stage + "\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    return run


def table(figures: dict[str, Any]) -> str:
    """Formats the figures as a text table."""
    speeds = figures["bytes_per_second"]
    rows = []
    for name, speed in speeds.items():
        if not name.startswith("datatrove, "):
            theirs = speeds.get(f"datatrove, {name}")
            columns = (f"{theirs / 1e6:.2f}", f"{speed / theirs:.1f} x") if theirs else ("", "")
            rows.append((name, f"{speed / 1e6:.2f}", *columns))
    ratio = speeds["cleaning"] / speeds["cleaning, as before"]
    minhash = speeds["MinHash"] / speeds["MinHash by datasketch"]
    head = f"{figures['documents']:,} documents, {figures['text_bytes']:,} bytes, MB/s of one core"
    return (
        f"{head}\n{text_table(('stage', 'ours', 'datatrove', 'ratio'), rows, '<>>>')}\n"
        f"MinHash is {minhash:.1f} x as fast as datasketch's, cleaning {ratio:.1f} x as before"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
