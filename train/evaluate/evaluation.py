"""What `python -m train.evaluate` does with one model: opens it, evaluates it, keeps and prints results."""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.loader import build_validation_loaders
from data.tokenizer import open_tokenizer
from data.write_shards import ensure_shards
from train.evaluate import results
from train.evaluate.harness import headline, read_tasks, run_harness
from train.evaluate.retrieval import retrieval
from train.evaluate.run_suite import run_suite
from train.evaluate.scorer import Scorer
from train.evaluate.suite import as_dict, load_suite
from train.evaluate.tasks import hugging_face_tokenizer
from train.hf.export import write_folder
from train.hf.folders import CONFIG_FILE, SOURCE_FOLDER
from train.hf.open_decoder import open_decoder
from train.hf.weights import WeightSource
from train.recipe.errors import UserError
from train.recipe.schema import Precision
from train.recipe.topology import Topology
from train.record import metrics
from train.record.run_folder import CHECKPOINTS_FOLDER
from train.report.run_page import write_report


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that is evaluated."""

    scorer: Scorer
    tokenizer: Any
    source: WeightSource

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run that it is of."""
        return self.source.path.parent.parent if self.source.recipe is not None else None

    @property
    def batch(self) -> int | None:
        """Batches that it was trained for."""
        return int(self.source.path.name.rpartition("-")[2]) if self.source.recipe is not None else None

    def keep(self, kind: str, name: str, fields: dict[str, Any]) -> None:
        """Puts a result into the run's folder."""
        if self.run_dir is not None:
            results.add_result(self.run_dir, kind, name, self.batch, fields)


def evaluate_source(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluates one model as the command line says; returns all results as plain values.

    Raises:
        UserError: if there are no whole weights.
        UserError: for data that is not what it should be.
    """
    opened = open_model(path, options)
    print(f"{opened.source.path}: sequences of {opened.scorer.limit} tokens")
    found: dict[str, Any] = {"batch": opened.batch}
    if options.suite:
        found[results.SUITE] = evaluate_suite(opened, options)
    if options.retrieval:
        found[results.RETRIEVAL] = evaluate_retrieval(opened, options)
    if options.bits_per_byte:
        found[results.BITS] = evaluate_bits(opened)
    if options.harness:
        found[results.HARNESS] = evaluate_harness(opened, options)
    if opened.run_dir is not None and (opened.run_dir / CHECKPOINTS_FOLDER).is_dir():
        page = write_report(opened.run_dir)
        print(f"{page}; `python -m train.tracking upload {opened.run_dir}` sends it to MLflow")
    return found


def _advance(bar: Any) -> None:
    bar.update()


def open_model(path: Path, options: argparse.Namespace) -> Opened:
    """The decoder with its tokenizer."""
    decoder, source = open_decoder(path, options.checkpoint, options.device)
    precision = Precision.bf16 if options.dtype == "bf16" else Precision.fp32
    scorer = Scorer(decoder, precision, Topology(), source.model.max_sequence_tokens)
    if source.recipe is not None:
        handle = open_tokenizer(source.recipe.tokenizer, Path(source.recipe.data.shards))
        return Opened(scorer, hugging_face_tokenizer(handle), source)
    from transformers import AutoTokenizer

    for folder in (source.path / SOURCE_FOLDER, source.path):
        if (folder / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            return Opened(scorer, tokenizer, source)
    raise UserError(f"{source.path}: came without tokenizer.json")


def evaluate_suite(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """The suite's scores, printed as a table."""
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
    print(f"{'task':28} {'category':26} {'shots':>5} {'questions':>9} {'accuracy':>8} {'score':>7}")
    for name, found in result.results.items():
        task = suite.tasks[name]
        score = result.scores.tasks[name]
        asked = f"{name:28} {task.category:26} {task.shots:5} {found.questions:9,}"
        print(f"{asked} {found.accuracy:8.4f} {score:7.4f}")
    for category, score in result.scores.categories.items():
        print(f"{category:82} {score:7.4f}")
    for category, lacking in result.scores.missing.items():
        print(f"{category}: no score, lacks {', '.join(lacking)}")
    if result.scores.average is not None:
        print(f"{'average':82} {result.scores.average:7.4f}")
    if options.answers:
        lines = (json.dumps(dataclasses.asdict(answer)) for answer in result.answers)
        options.answers.write_text("\n".join(lines) + "\n")
    fields = {
        "tasks": {name: dataclasses.asdict(found) for name, found in result.results.items()},
        "scores": as_dict(result.scores),
        "limit": options.questions,
    }
    opened.keep(results.SUITE, suite.name, fields)
    if opened.run_dir is not None:
        results.add_metrics(opened.run_dir, opened.batch, results.as_metrics(result.scores))
    return fields


def evaluate_retrieval(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of retrieval by length and depth, printed as a table."""
    lengths = [length for length in options.lengths if length <= opened.scorer.limit]
    if len(lengths) < len(options.lengths):
        print(f"retrieval: lengths above the model's {opened.scorer.limit} tokens are left out")

    def encode(text: str) -> list[int]:
        return list(opened.tokenizer(text, add_special_tokens=False)["input_ids"])

    with tqdm(total=len(lengths) * len(options.depths), desc="retrieval", unit="cell") as bar:
        cells = retrieval(
            opened.scorer, encode, lengths, options.depths, options.trials, progress=lambda *_: _advance(bar)
        )
    print("depth    " + "".join(f"{f'{length:,}':>10}" for length in lengths) + "  tokens; accuracy")
    for depth in options.depths:
        row = [cell.accuracy for cell in cells if cell.depth == depth]
        print(f"{depth:6.0%}   " + "".join(f"{accuracy:10.2f}" for accuracy in row))
    fields = {"cells": [dataclasses.asdict(cell) for cell in cells], "trials": options.trials}
    opened.keep(results.RETRIEVAL, "key-value", fields)
    return fields


@torch.no_grad()
def evaluate_bits(opened: Opened) -> dict[str, Any]:
    """Loss and bits per byte of each domain's validation set, printed as a table.

    Raises:
        UserError: for a model that is not a run's, as it has no shards.
    """
    recipe = opened.source.recipe
    if recipe is None:
        raise UserError("is no run, so that it has no shards", key="--bits-per-byte", remedy="give a run")
    manifest = ensure_shards(recipe)
    handle = open_tokenizer(recipe.tokenizer, Path(recipe.data.shards))
    domains = {}
    for domain, loader in build_validation_loaders(recipe, handle, rank=0, world_size=1).items():
        loss, tokens = 0.0, 0
        for batch in tqdm(loader, desc=domain, unit="batch", leave=False):
            documents = batch["document_ids"] if recipe.training.document_masking else None
            of_batch, targets = opened.scorer.loss(batch["input_ids"], documents, batch["targets"])
            loss, tokens = loss + of_batch, tokens + targets
        size = manifest.domains[domain].splits["validation"].bytes_per_token
        bits = metrics.in_bits_per_byte(loss / tokens, size)
        domains[domain] = {"loss": loss / tokens, "bits_per_byte": bits, "tokens": tokens}
        print(f"{domain:20} {loss / tokens:8.4f} nats/token {bits:8.4f} bits/byte {tokens:12,} tokens")
    fields = {"domains": domains}
    opened.keep(results.BITS, "validation", fields)
    return fields


def evaluate_harness(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's figures, printed as a table."""
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
    for name, (metric, value) in shown.items():
        print(f"{name:28} {metric:26} {value:8.4f}")
    average = sum(value for _, value in shown.values()) / len(shown)
    print(f"{'average':55} {average:8.4f}")
    fields = {
        "tasks": {name: {"metric": metric, "value": value} for name, (metric, value) in shown.items()},
        "average": average,
        "limit": options.questions,
    }
    opened.keep(results.HARNESS, Path(options.harness).stem, fields)
    return fields
