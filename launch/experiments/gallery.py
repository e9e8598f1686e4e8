"""Runs that are sound and sick, as their reports show them: `python -m launch.experiments.gallery`.

A small recipe is trained once as it is and once with each planted fault. Every run gets a figure of its loss,
gradient norm and expert load with the guard's alarms, and a row of the table in docs/gallery.md; the loss of
the sound run lies behind each. Runs that are complete are not trained again.
"""

import contextlib
import random
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from data.text.installed import CorpusDocument, installed_corpus
from data.write_shards import build_shards
from train.model import attention
from train.model.moe import balance_loss
from train.recipe.errors import UserError
from train.recipe.exit_status import REPLAY_STATUS
from train.recipe.reading import load_recipe
from train.recipe.schema import Model
from train.recipe.topology import Topology
from train.record import metrics
from train.record.command import command
from train.record.page.svg import COLOURS, INK, STYLE, log_scale
from train.record.tables import markdown_table
from train.report.plots import millions, smoothed, thinned
from train.report.run_record import RunRecord, read_run
from train.run import run
from train.step import microbatch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE, FOLDER = "gallery.md", "gallery"
BEGIN, END = "<!-- launch.experiments.gallery: begin -->", "<!-- end -->"
SMALL = (
    "data.corpus_bytes=600000",
    "data.sequence_tokens=64",
    "data.validation_sequences=8",
    "data.max_epochs=8",
    "tokenizer.vocab_size=512",
    "model.vocab_size=512",
    "model.max_sequence_tokens=64",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.ffn_hidden_size=48",
    "model.moe.top_k=2",
    "training.duration_tokens=153600",
    "training.precision=fp32",
    "optimizer.learning_rate=0.01",
    "schedule.warmup_tokens=15360",
    "evaluation.interval_batches=null",
    "checkpoint.interval_batches=300",
    "tracking.mlflow=false",
)
"""Changes of yamls/smoke.yaml that make a run of less than a minute on two cores."""
NOISY = (
    "guard.norm_deviations=20",
    "guard.rollback_before_batches=1",
    "guard.rollback_after_batches=6",
    "checkpoint.interval_batches=10",
    "checkpoint.keep_last=4",
)
"""Further changes of runs on noise: a guard for a run so small, and checkpoints to go back to."""
NOISE_EVERY, NOISE_CHARACTERS = 12, 700
"""Documents of code from one document of noise to the next, and its length."""
POINTS = 300
"""Points of a curve at most."""

Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Exhibit:
    """A run of the gallery."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    plant: Plant = contextlib.nullcontext
    documents: Callable[[int], Iterator[CorpusDocument]] | None = None
    """Text in place of the installed corpus, given the bound on the bytes of each domain."""


def with_noise(most_bytes: int) -> Iterator[CorpusDocument]:
    """Yields the installed corpus, and among its code a few long documents of random rare characters."""
    code, draw = 0, random.Random(0)
    for document in installed_corpus(most_bytes):
        yield document
        if document.domain == "code":
            code += 1
            if code % NOISE_EVERY == 0:
                text = "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(NOISE_CHARACTERS))
                yield CorpusDocument("code", f"noise/{code // NOISE_EVERY}.txt", text + "\n")


def spread_no_load() -> AbstractContextManager[Any]:
    """Turns the balance loss around: experts that have tokens get more."""
    return mock.patch.object(microbatch, "balance_loss", lambda *figures: -balance_loss(*figures))


def forget_places() -> AbstractContextManager[Any]:
    """Rotates every query and key as if it were the first of its sequence."""
    original = attention._rotations

    def rotations(model: Model, place_S: Tensor) -> tuple[Tensor, Tensor]:
        return original(model, place_S * 0)

    return mock.patch.object(attention, "_rotations", rotations)


EXHIBITS = (
    Exhibit("healthy", "sound"),
    Exhibit("rate", "30 times the learning rate", ("optimizer.learning_rate=0.3",)),
    Exhibit("collapse", "routers that collapse", plant=spread_no_load),
    Exhibit("places", "places in the sequence lost", plant=forget_places),
    Exhibit("noise", "documents of noise", NOISY, documents=with_noise),
    Exhibit(
        "rollback",
        "noise, with rollback",
        (*NOISY, "guard.on_spike=rollback"),
        documents=with_noise,
    ),
)


def train(exhibit: Exhibit, folder: Path, overrides: Sequence[str]) -> RunRecord:
    """Trains a run, if it is not complete, and returns its record."""
    shards = folder / ("shards" if exhibit.documents is None else "shards-noise")
    places = (f"name={exhibit.name}", f"runs_dir={folder}", f"data.shards={shards}")
    given = [*SMALL, *places, "on_existing=resume", *exhibit.overrides, *overrides]
    recipe = load_recipe(ROOT / "yamls/smoke.yaml", given)
    text = exhibit.documents
    # Small shards, read one after the other, so that a document's sequences fall into neighbouring batches.
    with mock.patch("data.text.mds.SHARD_BYTES", 1 << 13) if text else contextlib.nullcontext():
        build_shards(recipe, documents=text and (lambda: text(recipe.data.corpus_bytes)))
    with exhibit.plant():
        while (status := run(recipe, Topology())) == REPLAY_STATUS:
            pass  # A rollback, which the supervisor would start again.
    if status:
        raise UserError(f"{folder / exhibit.name} ended with status {status}; its log says why")
    return read_run(folder / exhibit.name)


def draw(exhibit: Exhibit, record: RunRecord, sound: RunRecord, file: Path) -> None:
    """Draws loss, gradient norm and expert load over tokens, with the alarms, as an SVG on white."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = STYLE | {"svg.hashsalt": exhibit.name, "path.simplify": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 5.0), layout="constrained")
        FigureCanvasSVG(figure)
        loss, norm, load = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2, 2)})
        if record is not sound:
            _curve(loss, sound, metrics.LOSS, "#9ca3af", "loss of the sound run")
            _curve(norm, sound, metrics.GRADIENT_NORM, "#9ca3af", "")
        _curve(loss, record, metrics.LOSS, COLOURS[0], "loss")
        loss.set_ylabel("nats per token")
        _curve(norm, record, metrics.GRADIENT_NORM, COLOURS[1], "gradient norm")
        norm.set_ylabel("gradient norm")
        log_scale(norm)
        experts, layers = record.load_shares.shape[2], range(record.load_shares.shape[1])
        for key, label, colour in (
            (metrics.EXPERT_BUSIEST, "busiest expert", COLOURS[4]),
            (metrics.EXPERT_IDLEST, "idlest expert", COLOURS[0]),
        ):
            for layer in layers:
                shown = "" if layer else label
                _curve(load, record, metrics.of_layer(key, layer), colour, shown, scale=experts)
        load.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        load.set_ylabel("expert load")
        load.set_ylim(0, None)
        load.set_xlabel("million tokens")
        load.legend(ncols=2)
        for place, alarm in enumerate(_alarm_places(record)):
            loss.axvline(alarm, ymax=0.08, color=COLOURS[4], linewidth=2, label="_" * (place > 0) + "alarm")
        loss.legend(loc="upper right", ncols=3)
        loss.set_title(exhibit.title, loc="left")
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})
    # Blanks at the ends of lines are matplotlib's.
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))


def _curve(axis: Any, record: RunRecord, key: str, colour: str, label: str, scale: float = 1.0) -> None:
    """Draws every step faintly, and the moving average."""
    series = thinned(record.series(key), POINTS)
    values = series.values * scale
    axis.plot(millions(series), values, color=colour, alpha=0.35, linewidth=0.7)
    axis.plot(millions(series), smoothed(values), color=colour, label=label or "_", linewidth=1.4)


def _alarm_places(record: RunRecord) -> list[float]:
    tokens = {line["step"]: line["tokens"] for line in record.steps}
    return [tokens[alarm.step] / 1e6 for alarm in record.alarms if alarm.step in tokens]


def table(records: dict[str, RunRecord]) -> str:
    """Returns a row for each run: loss and gradient norm at its end, extreme loads, alarms."""
    rows = []
    for exhibit in EXHIBITS:
        record = records[exhibit.name]
        steps = max(1, len(record.steps) // 10)

        def end(key: str, record: RunRecord = record, steps: int = steps) -> float:
            return float(np.nanmean(record.series(key).values[-steps:]))

        experts, layers = record.load_shares.shape[2], range(record.load_shares.shape[1])
        busiest, idlest = (
            pick(end(metrics.of_layer(key, layer)) for layer in layers) * experts
            for key, pick in ((metrics.EXPERT_BUSIEST, max), (metrics.EXPERT_IDLEST, min))
        )
        first = record.alarms[0] if record.alarms else None
        said = f"batch {first.step}: {first.reasons[0]}" if first else ""
        rows.append(
            (
                exhibit.title,
                f"{end(metrics.LOSS):.2f}",
                f"{end(metrics.GRADIENT_NORM):.2f}",
                f"{busiest:.1f}, {idlest:.2f}",
                str(len(record.alarms)),
                said.replace("|", "\\|"),
            )
        )
    heads = ("run", "loss", "gradient norm", "busiest, idlest expert", "alarms", "the first of them")
    return markdown_table(heads, rows, "<>>>><")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "overrides", nargs="*", help="recipe overrides, such as training.duration_tokens=10240"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/gallery", help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and its figures")


@command(
    "python -m launch.experiments.gallery",
    "Trains a small model as it is and with planted faults, and writes figures and table of docs/gallery.md. "
    "Complete runs are not trained again.",
    add_arguments,
    intermixed=True,
)
def main(options: Namespace) -> int:
    """Trains what is missing, and writes the figures and the table."""
    page = options.docs / PAGE
    before, found, rest = page.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise UserError(f"has no lines {BEGIN!r} and {END!r} for the table", file=str(page))
    records = {each.name: train(each, options.runs, options.overrides) for each in EXHIBITS}
    (options.docs / FOLDER).mkdir(exist_ok=True)
    for exhibit in EXHIBITS:
        file = options.docs / FOLDER / f"{exhibit.name}.svg"
        draw(exhibit, records[exhibit.name], records[EXHIBITS[0].name], file)
    rows = table(records)
    page.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}")
    print(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
