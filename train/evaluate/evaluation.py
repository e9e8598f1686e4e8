"""Evaluation of one model for `python -m train.evaluate`; stores and prints the evaluations."""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.loader import build_validation_loaders
from data.opened import OpenedData
from data.write_shards import ensure_shards
from train.evaluate.harness import headline, read_tasks, run_harness
from train.evaluate.retrieval import retrieval
from train.evaluate.run_suite import SuiteResult, run_suite
from train.evaluate.scorer import Scorer
from train.evaluate.suite import Suite, as_dict, as_metrics, load_suite
from train.evaluate.tasks import hugging_face_tokenizer
from train.hf.export import write_folder
from train.hf.folders import CONFIG_FILE, SOURCE_FOLDER
from train.hf.model_card import tokenizer_of
from train.hf.open_decoder import open_decoder
from train.hf.weights import WeightSource
from train.recipe.errors import UserError
from train.recipe.schema import Precision
from train.recipe.topology import Topology
from train.record import evaluations, log, metrics
from train.record.run_folder import CHECKPOINTS_FOLDER
from train.record.tables import text_table
from train.report.run_page import write_report

logger = log.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model opened for evaluation."""

    scorer: Scorer
    tokenizer: Any
    source: WeightSource
    data: OpenedData | None = None
    """Data of the model's run; None for weights that are not from a run."""

    @property
    def run_dir(self) -> Path | None:
        """Folder of the model's run; None if it has none."""
        return self.source.path.parent.parent if self.source.recipe is not None else None

    @property
    def batch(self) -> int | None:
        """Batches that the model was trained for; None if unknown."""
        return int(self.source.path.name.rpartition("-")[2]) if self.source.recipe is not None else None

    def keep(self, kind: str, name: str, fields: dict[str, Any]) -> None:
        """Stores a result in the run's folder; of an average under a name of its own."""
        if self.source.average is not None:
            name = f"{name} of {self.source.average}"
        if self.run_dir is not None:
            evaluations.add_result(self.run_dir, kind, name, self.batch, fields)


def evaluate_source(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluations of the command line on one model; returns all results as plain values.

    Raises:
        UserError: if the weights are incomplete or the data is invalid.
    """
    opened = open_model(path, options)
    print(f"{opened.source.path}: sequences of {opened.scorer.limit} tokens")
    found: dict[str, Any] = {"batch": opened.batch}
    if options.suite:
        found[evaluations.SUITE] = evaluate_suite(opened, options)
    if options.retrieval:
        found[evaluations.RETRIEVAL] = evaluate_retrieval(opened, options)
    if options.bits_per_byte:
        found[evaluations.BITS] = evaluate_bits(opened)
    if options.harness:
        found[evaluations.HARNESS] = evaluate_harness(opened, options)
    if opened.run_dir is not None and (opened.run_dir / CHECKPOINTS_FOLDER).is_dir():
        page = write_report(opened.run_dir)
        print(f"{page}; `python -m train.tracking upload {opened.run_dir}` uploads it to MLflow")
    return found


def _advance(bar: Any) -> None:
    bar.update()


def open_model(path: Path, options: argparse.Namespace) -> Opened:
    """Opens a decoder with its tokenizer."""
    decoder, source = open_decoder(path, options.checkpoint, options.device, average=options.average)
    precision = Precision.bf16 if options.dtype == "bf16" else Precision.fp32
    scorer = Scorer(decoder, precision, Topology(), source.model.max_sequence_tokens)
    if source.recipe is not None:
        data = OpenedData(source.recipe)
        return Opened(scorer, hugging_face_tokenizer(tokenizer_of(source.recipe, source.path)), source, data)
    from transformers import AutoTokenizer

    for folder in (source.path / SOURCE_FOLDER, source.path):
        if (folder / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            return Opened(scorer, tokenizer, source)
    raise UserError(f"{source.path}: has no tokenizer.json")


def evaluate_suite(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the suite; prints its scores as a table and returns them."""
    suite = load_suite(options.suite)
    with tqdm(total=len(options.task), unit="task") as bar:
        done: list[str] = []

        def progress(task: str, batch: int, batches: int) -> None:
            if task not in done:
                done.append(task)
                bar.n = len(done) - 1
            bar.set_description(f"{task} {batch}/{batches}")

        result = run_suite(
            opened.scorer,
            suite,
            options.task,
            options.data,
            opened.tokenizer,
            sequences=options.sequences,
            most=options.questions,
            progress=progress,
        )
        bar.n = len(options.task)
    print(suite_table(suite, result))
    for category, lacking in result.scores.missing.items():
        print(f"{category}: no score, lacks {', '.join(lacking)}")
    if options.answers:
        lines = (json.dumps(dataclasses.asdict(answer)) for answer in result.answers)
        options.answers.write_text("\n".join(lines) + "\n")
    fields = {
        "tasks": {name: dataclasses.asdict(found) for name, found in result.results.items()},
        "scores": as_dict(result.scores),
        "limit": options.questions,
    }
    opened.keep(evaluations.SUITE, suite.name, fields)
    if opened.run_dir is not None and opened.source.average is None:
        evaluations.add_metrics(opened.run_dir, opened.batch, as_metrics(result.scores))
    return fields


def suite_table(suite: Suite, result: SuiteResult) -> str:
    """Formats tasks, categories and the average as a text table."""
    rows = [
        (
            name,
            suite.tasks[name].category,
            str(suite.tasks[name].shots),
            f"{found.questions:,}",
            f"{found.accuracy:.4f}",
            f"{result.scores.tasks[name]:.4f}",
        )
        for name, found in result.results.items()
    ]
    scores = dict(result.scores.categories)
    if result.scores.average is not None:
        scores["average"] = result.scores.average
    rows += [(name, "", "", "", "", f"{score:.4f}") for name, score in scores.items()]
    return text_table(("task", "category", "shots", "questions", "accuracy", "score"), rows, "<<>>>>")


def evaluate_retrieval(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """Measures retrieval accuracy by length and depth; prints a table and returns the figures."""
    lengths = [length for length in options.lengths if length <= opened.scorer.limit]
    if len(lengths) < len(options.lengths):
        logger.warning(f"retrieval: lengths above the model's {opened.scorer.limit} tokens are skipped")

    def encode(text: str) -> list[int]:
        return list(opened.tokenizer(text, add_special_tokens=False)["input_ids"])

    with tqdm(total=len(lengths) * len(options.depths), desc="retrieval", unit="cell") as bar:
        cells = retrieval(
            opened.scorer, encode, lengths, options.depths, options.trials, progress=lambda *_: _advance(bar)
        )
    rows = [
        (f"{depth:.0%}", *(f"{cell.accuracy:.2f}" for cell in cells if cell.depth == depth))
        for depth in options.depths
    ]
    heads = ("depth", *(f"{length:,}" for length in lengths))
    print(f"{text_table(heads, rows, '>' * len(heads))}\naccuracy by depth and length in tokens")
    fields = {"cells": [dataclasses.asdict(cell) for cell in cells], "trials": options.trials}
    opened.keep(evaluations.RETRIEVAL, "key-value", fields)
    return fields


@torch.no_grad()
def evaluate_bits(opened: Opened) -> dict[str, Any]:
    """Measures loss and bits per byte of each domain's validation set; prints a table and returns them.

    Raises:
        UserError: for a model that is not from a run, as it has no shards.
    """
    if (data := opened.data) is None:
        raise UserError("needs the shards of a run", key="--bits-per-byte", remedy="give a run")
    ensure_shards(data)
    data.fetch()
    domains = {}
    for domain, loader in build_validation_loaders(data, rank=0, world_size=1).items():
        loss, tokens = 0.0, 0
        for batch in tqdm(loader, desc=domain, unit="batch", leave=False):
            documents = batch["document_ids"] if data.recipe.training.document_masking else None
            of_batch, targets = opened.scorer.loss(batch["input_ids"], documents, batch["targets"])
            loss, tokens = loss + of_batch, tokens + targets
        size = data.manifest.domains[domain].splits["validation"].bytes_per_token
        bits = metrics.in_bits_per_byte(loss / tokens, size)
        domains[domain] = {"loss": loss / tokens, "bits_per_byte": bits, "tokens": tokens}
    rows = [
        (
            domain,
            f"{found['loss']:.4f} nats/token",
            f"{found['bits_per_byte']:.4f} bits/byte",
            f"{found['tokens']:,} tokens",
        )
        for domain, found in domains.items()
    ]
    print(text_table((), rows, "<>>>"))
    fields = {"domains": domains}
    opened.keep(evaluations.BITS, "validation", fields)
    return fields


def evaluate_harness(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """Runs lm-eval; prints its figures as a table and returns them."""
    tasks = read_tasks(options.harness)
    dtype = "bfloat16" if options.dtype == "bf16" else "float32"
    with tempfile.TemporaryDirectory(prefix="exported-") as scratch:
        folder = opened.source.path
        if not (folder / CONFIG_FILE).is_file():
            folder = Path(scratch) / "model"
            write_folder(opened.source, folder)
        found = run_harness(
            folder,
            tasks,
            data=options.harness_data,
            include=options.harness_tasks,
            limit=options.questions,
            batch_size=options.sequences,
            device=opened.scorer.device.type,
            dtype=dtype,
        )
    shown = {name: headline(name, task, found) for name, task in tasks.items()}
    average = sum(value for _, value in shown.values()) / len(shown)
    rows = [(name, metric, f"{value:.4f}") for name, (metric, value) in shown.items()]
    print(text_table((), [*rows, ("average", "", f"{average:.4f}")], "<<>"))
    fields = {
        "tasks": {name: {"metric": metric, "value": value} for name, (metric, value) in shown.items()},
        "average": average,
        "limit": options.questions,
    }
    opened.keep(evaluations.HARNESS, Path(options.harness).stem, fields)
    return fields
