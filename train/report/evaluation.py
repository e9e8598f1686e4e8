"""The report's part on evaluations: scores over training, tables of the newest checkpoint, heat maps."""

from collections.abc import Sequence
from typing import Any

from train.evaluate.results import BITS, HARNESS, RETRIEVAL, SUITE, read_results
from train.record import metrics
from train.report.plots import COLOURS, render
from train.report.run_record import RunRecord


def evaluation_tables(run: RunRecord) -> str:
    """HTML of everything in the run's file of results; empty if there is none."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in read_results(run.run_dir):
        key = record["kind"], record["name"]
        if key not in newest or (record["batch"] or 0) >= (newest[key]["batch"] or 0):
            newest[key] = record
    writers = {SUITE: _suite, HARNESS: _harness, RETRIEVAL: _retrieval, BITS: _bits}
    parts = [_over_time(run)]
    for (kind, name), record in newest.items():
        parts += [f"<p>{_title(kind, name, record)}</p>", writers[kind](record)]
    return "\n".join(filter(None, parts))


def _title(kind: str, name: str, record: dict[str, Any]) -> str:
    of = {SUITE: "Suite", HARNESS: "lm-eval", RETRIEVAL: "Retrieval", BITS: "Bits per byte"}[kind]
    limit = f", the first {record['limit']} questions of each task" if record.get("limit") else ""
    return f"{of} {name} after {record['batch']:,} batches{limit}."


def _suite(record: dict[str, Any]) -> str:
    from train.report.run_page import table

    scores = record["scores"]
    rows = [
        (name, f"{found['questions']:,}", f"{found['accuracy']:.4f}", f"{scores['tasks'][name]:.4f}")
        for name, found in record["tasks"].items()
    ]
    html = table(("task", "questions", "accuracy", "score (0 is guessing)"), rows)
    summed = [(name, f"{value:.4f}") for name, value in scores["categories"].items()]
    summed += [(name, f"no score: lacks {', '.join(lacking)}") for name, lacking in scores["missing"].items()]
    if scores["average"] is not None:
        summed.append(("average", f"{scores['average']:.4f}"))
    return html + ("<br>" + table(("category", "score"), summed) if summed else "")


def _harness(record: dict[str, Any]) -> str:
    from train.report.run_page import table

    rows = [(name, found["metric"], f"{found['value']:.4f}") for name, found in record["tasks"].items()]
    return table(("task", "metric", "value"), [*rows, ("average", "", f"{record['average']:.4f}")])


def _bits(record: dict[str, Any]) -> str:
    from train.report.run_page import table

    rows = [
        (name, f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", f"{found['tokens']:,}")
        for name, found in record["domains"].items()
    ]
    return table(("domain", "loss (nats/token)", "bits per byte", "tokens"), rows)


def _retrieval(record: dict[str, Any]) -> str:
    from train.report.run_page import figure

    cells = record["cells"]
    caption = f"Share of {record['trials']} values found, by length of the prompt and place in it."
    return figure(retrieval_figure(cells), caption)


def retrieval_figure(cells: Sequence[dict[str, Any]]) -> str:
    """Heat maps of accuracy, and of the loss of the values' tokens, by depth and length."""
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

    return render("Key-value retrieval by depth and length", draw, heights=(2.6,), columns=2)


def _over_time(run: RunRecord) -> str:
    from train.report.run_page import figure

    keys = metrics.match_names(metrics.EVALUATION_CATEGORY, run.keys)
    shown = {name: run.series(key) for name, key in keys.items()}
    if metrics.EVALUATION_AVERAGE in run.keys:
        shown["average"] = run.series(metrics.EVALUATION_AVERAGE)
    if not any(len(series) > 1 for series in shown.values()):
        return ""

    def draw(axes: Sequence[Any]) -> None:
        for number, (name, series) in enumerate(shown.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes[0].plot(series.tokens / 1e6, series.values, "o-", markersize=4, color=colour, label=name)
        axes[0].axhline(0, linewidth=0.8, color="#888888")
        axes[0].set_ylabel("score")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return figure(
        render("Scores of the suite over tokens", draw, heights=(2.6,)), "0 is guessing, 1 is perfect."
    )
