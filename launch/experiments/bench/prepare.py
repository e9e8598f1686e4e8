"""Speed of preparing shards, against LLM Foundry and on Spark: `python -m launch.experiments.bench.prepare`.

All sides read the same text files, on all cores, and write MDS shards of cl100k_base tokens; they alternate,
and a figure is the ratio of medians. Ours is measured twice: only tokenising and writing, like the converter,
and the full job with signatures and near-duplicate removal.
"""

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.shards.manifest import Manifest
from data.text.engines import Engine, Item, Processes, Spark, Stage
from data.text.installed import installed_corpus
from data.text.job import PreparationJob, Result
from data.tokenizer import open_tokenizer
from data.write_shards import build_shards
from train.layout.device import describe_hardware
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import Data, Recipe, Tokenizer, TokenizerKind
from train.recipe.topology import usable_cores
from train.record.command import Figures, command
from train.record.provenance import git_commit
from train.record.tables import text_table

SEQUENCE_TOKENS = 2048
GOALS = {"vs_llmfoundry": 5.0, "spark_vs_processes": 0.7}
TOKENISING = ("tokenising", "writing shards")
"""Titles of the stages that the converter also has."""


class Timed:
    """An engine that records the duration of each stage."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.seconds = engine, dict[str, float]()

    def run(self, title: str, stage: Stage[Item], job: PreparationJob, items: Sequence[Item]) -> list[Result]:
        """Runs and times a stage."""
        start = time.perf_counter()
        results = self._engine.run(title, stage, job, items)
        self.seconds[title] = time.perf_counter() - start
        return results


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--megabytes", type=int, default=16, help="text per domain, at most (default 16)")


@command(
    "python -m launch.experiments.bench.prepare", __doc__, add_arguments, json="write the figures as JSON"
)
def main(options: Namespace) -> Figures:
    """Runs the benchmark and prints its table."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.rounds, options.megabytes * 1_000_000)
    print(table(figures))
    return Figures(figures)


def measure(folder: Path, rounds: int, max_bytes: int) -> dict[str, Any]:
    """Measures all sides in tokens per second, and their ratios."""
    text_bytes = write_texts(folder / "text", max_bytes)
    processes = Processes(usable_cores())
    recipe = recipe_of(folder)
    start = time.perf_counter()
    spark = Spark(usable_cores())
    spark_start_seconds = time.perf_counter() - start
    peer = foundry_converter(folder, recipe)
    seconds: dict[str, list[float]] = {}
    tokens = 0
    for _ in range(rounds + 1):  # The first warms up caches and Spark's workers, and does not count.
        for name, engine in (("processes", processes), ("spark", spark)):
            timed = Timed(engine)
            manifest, total = _timed(partial(build_shards, recipe, rebuild=True, engine=timed))
            seconds.setdefault(name, []).append(total)
            tokenising = sum(timed.seconds[title] for title in TOKENISING)
            seconds.setdefault(f"{name}, tokenise and write", []).append(tokenising)
            tokens = tokens_of(manifest)
        seconds.setdefault("llmfoundry", []).append(_timed(peer)[1])
    spark.stop()
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "vs_llmfoundry": medians["llmfoundry"] / medians["processes, tokenise and write"],
        "whole_vs_llmfoundry": medians["llmfoundry"] / medians["processes"],
        "spark_vs_processes": medians["processes"] / medians["spark"],
        "tokens": tokens,
        "text_bytes": text_bytes,
        "spark_start_seconds": spark_start_seconds,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "machine": {"hardware": describe_hardware("cpu"), "commit": git_commit()},
    }


def write_texts(folder: Path, max_bytes: int) -> int:
    """Writes the installed corpus as text files; returns their total bytes."""
    folder.mkdir()
    total = 0
    for number, document in enumerate(installed_corpus(max_bytes)):
        (folder / f"{number:06}.txt").write_text(document.text)
        total += len(document.text.encode())
    return total


def recipe_of(folder: Path) -> Recipe:
    """Builds a recipe with the text files as its only source."""
    facts = {"dataset": "installed", "version": "0", "origin": "this machine", "licence": "various"}
    source = Source("all", SourceKind.text, str(folder / "text"), **facts)  # type: ignore[arg-type]
    data = Data(
        shards=str(folder / "shards"),
        domains={"all": 1.0},
        sources=[source],
        preparation=Preparation(chunk_bytes=2_000_000),
        sequence_tokens=SEQUENCE_TOKENS,
    )
    return dataclasses.replace(Recipe(), tokenizer=Tokenizer(TokenizerKind.cl100k_base), data=data)


def foundry_converter(folder: Path, recipe: Recipe) -> Callable[[], object]:
    """Prepares LLM Foundry's text converter with the same tokenizer in Hugging Face format."""
    from train.model import megablocks_ops

    megablocks_ops.install()
    from llmfoundry.command_utils.data_prep.convert_text_to_mds import convert_text_to_mds

    open_tokenizer(recipe.tokenizer, folder).to_hugging_face(folder / "tokenizer")

    def convert() -> None:
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        convert_text_to_mds(
            tokenizer_name=str(folder / "tokenizer"),
            output_folder=str(folder / "theirs"),
            input_folder=str(folder / "text"),
            concat_tokens=SEQUENCE_TOKENS,
            eos_text="<|endoftext|>",
            bos_text="",
            no_wrap=False,
            compression="",
            processes=usable_cores(),
            args_str="{}",
            reprocess=True,
            trust_remote_code=False,
        )

    return convert


def tokens_of(manifest: Manifest) -> int:
    """Number of tokens in all splits."""
    return sum(split.tokens for domain in manifest.domains.values() for split in domain.splits.values())


def table(figures: dict[str, Any]) -> str:
    """Formats the figures as a text table."""
    rows = [(name, f"{speed:,.0f}", "tokens/s") for name, speed in figures["tokens_per_second"].items()]
    for key, goal in GOALS.items():
        met = "reached" if figures[key] >= goal else "NOT reached"
        rows.append((key, f"{figures[key]:.2f}", f"goal {goal} {met}"))
    rows.append(("whole_vs_llmfoundry", f"{figures['whole_vs_llmfoundry']:.2f}", ""))
    rows.append(("Spark session starts in", f"{figures['spark_start_seconds']:.1f}", "s, not counted above"))
    head = f"{figures['text_bytes']:,} bytes of text, {figures['tokens']:,} tokens"
    return f"{head}\n{text_table((), rows, '<><')}"


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
