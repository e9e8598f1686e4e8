"""The report's evaluation section: scores over training, tables of the newest checkpoint, heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from train.record import metrics
from train.record.evaluations import BITS, HARNESS, RETRIEVAL, SUITE, read_results
from train.record.page.svg import COLOURS, draw_svg
from train.report.run_record import RunRecord

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]
"""Heads and rows."""


@dataclass(frozen=True)
class EvaluationSection:
    """One evaluation of a run, as shown on its page."""

    title: str
    tables: Sequence[Table] = ()
    figure: Markup | None = None
    caption: str = ""


def newest_evaluations(run: RunRecord) -> list[EvaluationSection]:
    """Returns every evaluation of a run's results, each for the newest checkpoint that has it."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in read_results(run.run_dir):
        key = record["kind"], record["name"]
        if key not in newest or (record["batch"] or 0) >= (newest[key]["batch"] or 0):
            newest[key] = record
    makers = {SUITE: _suite, HARNESS: _harness, RETRIEVAL: _retrieval, BITS: _bits}
    return [makers[kind](_title(kind, name, record), record) for (kind, name), record in newest.items()]


def _title(kind: str, name: str, record: dict[str, Any]) -> str:
    of = {SUITE: "Suite", HARNESS: "lm-eval", RETRIEVAL: "Retrieval", BITS: "Bits per byte"}[kind]
    limit = f", the first {record['limit']} questions of each task" if record.get("limit") else ""
    after = "" if record["batch"] is None else f" after {record['batch']:,} batches"
    return f"{of} {name}{after}{limit}."


def _suite(title: str, record: dict[str, Any]) -> EvaluationSection:
    scores = record["scores"]
    rows = [
        (name, f"{found['questions']:,}", f"{found['accuracy']:.4f}", f"{scores['tasks'][name]:.4f}")
        for name, found in record["tasks"].items()
    ]
    summed = [(name, f"{value:.4f}") for name, value in scores["categories"].items()]
    summed += [(name, f"no score: lacks {', '.join(lacking)}") for name, lacking in scores["missing"].items()]
    if scores["average"] is not None:
        summed.append(("average", f"{scores['average']:.4f}"))
    tables: list[Table] = [(("task", "questions", "accuracy", "score (0 is guessing)"), rows)]
    if summed:
        tables.append((("category", "score"), summed))
    return EvaluationSection(title, tables)


def _harness(title: str, record: dict[str, Any]) -> EvaluationSection:
    rows = [(name, found["metric"], f"{found['value']:.4f}") for name, found in record["tasks"].items()]
    rows.append(("average", "", f"{record['average']:.4f}"))
    return EvaluationSection(title, [(("task", "metric", "value"), rows)])


def _bits(title: str, record: dict[str, Any]) -> EvaluationSection:
    rows = [
        (name, f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", f"{found['tokens']:,}")
        for name, found in record["domains"].items()
    ]
    return EvaluationSection(title, [(("domain", "loss (nats/token)", "bits per byte", "tokens"), rows)])


def _retrieval(title: str, record: dict[str, Any]) -> EvaluationSection:
    caption = f"Share of {record['trials']} values found, by prompt length and depth."
    return EvaluationSection(title, figure=retrieval_figure(record["cells"]), caption=caption)


def retrieval_figure(cells: Sequence[dict[str, Any]]) -> Markup:
    """Draws heat maps of accuracy and of the loss of the values' tokens, by depth and length."""
    import numpy as np

    lengths = sorted({cell["length_tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    found = {(cell["depth"], cell["length_tokens"]): cell for cell in cells}

    def draw(axes: Sequence[Any]) -> None:
        for axis, key, title, colours in (
            (axes[0], "accuracy", "accuracy", "RdYlGn"),
            (axes[1], "token_loss", "loss of the value's tokens (nats)", "RdYlGn_r"),
        ):
            values = np.array([[found[depth, length][key] for length in lengths] for depth in depths])
            top = 1.0 if key == "accuracy" else max(float(np.nanmax(values)), 1e-9)
            axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=top, alpha=0.75)
            for (row, column), value in np.ndenumerate(values):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axis.set_xlabel("tokens")
            axis.set_ylabel("depth")
            axis.set_title(title, fontsize=10)
            axis.grid(False)

    return draw_svg("Key-value retrieval by depth and length", draw, heights=(2.6,), columns=2)


def scores_over_time(run: RunRecord) -> Markup | None:
    """Draws the suite's scores over tokens; None while no score has two points."""
    keys = metrics.match_names(metrics.EVALUATION_CATEGORY, run.keys)
    shown = {name: run.series(key) for name, key in keys.items()}
    if metrics.EVALUATION_AVERAGE in run.keys:
        shown["average"] = run.series(metrics.EVALUATION_AVERAGE)
    if not any(len(series) > 1 for series in shown.values()):
        return None

    def draw(axes: Sequence[Any]) -> None:
        for number, (name, series) in enumerate(shown.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes[0].plot(series.tokens / 1e6, series.values, "o-", markersize=4, color=colour, label=name)
        axes[0].axhline(0, linewidth=0.8, color="#888888")
        axes[0].set_ylabel("score")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return draw_svg("Scores of the suite over tokens", draw, heights=(2.6,))
