"""One page about a run, in one file that needs nothing else."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from train.recipe.units import duration, short_number
from train.record import metrics
from train.record.run_folder import REPORT_FILE
from train.report.run_record import RunRecord, read_run

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2024; --faint: #60646c; --page: #fcfcfd; --card: #f2f3f5;
  --line: #d9dadf; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --faint: #9ba1a6; --page: #131517; --card: #1d2023; --line: #34383c; }} }}
body {{ margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
p, figcaption {{ color: var(--faint); margin: .2rem 0 .6rem; }}
svg {{ width: 100%; height: auto; }}
figure {{ margin: 0; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }}
.card {{ background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }}
.card b {{ display: block; font-size: 1.25rem; font-weight: 600; }}
.card span {{ color: var(--faint); font-size: .85rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }}
td.long {{ overflow-wrap: anywhere; font-size: .8rem; }}
td.number, th.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
pre {{ background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; }}
.bar {{ display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; }}
.key {{ display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
NUMBER = re.compile(r"([\d,.]+( ms|%)?)?")
LONG_CELL = 60
PART_COLOURS = ("#ef4444", "#3b82f6", "#a855f7", "#10b981", "#94a3b8")


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run's folder, from the files there; the run need not be complete.

    Raises:
        UserError: if it is not the folder of a run.
    """
    run = read_run(run_dir)
    sections: Sequence[Callable[[RunRecord], str]] = (
        header,
        loss_section,
        domain_section,
        throughput_section,
        step_time_section,
        optimisation_section,
        expert_section,
        evaluation_section,
        sample_section,
        origin_section,
        recipe_section,
    )
    body = "\n".join(filter(None, (section(run) for section in sections)))
    path = run_dir / REPORT_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(PAGE.format(title=html.escape(f"Run {run.name}"), body=body))
    partial.replace(path)
    return path


def key_figures(run: RunRecord) -> dict[str, float | str]:
    """What a run came to, in few numbers; those that are not known yet are left out."""
    figures: dict[str, float | str] = {
        "name": run.name,
        "status": "complete" if run.summary else "not complete",
    }
    for domain, key in metrics.match_names(metrics.LOSS_VALIDATION, run.keys).items():
        figures[f"validation loss, {domain}"] = float(run.series(key).values[-1])
    if run.steps:
        figures["batches"] = run.steps[-1]["step"]
        figures["tokens"] = run.steps[-1]["tokens"]
    for label, key in (
        ("tokens/s, median", metrics.TOKENS_PER_SECOND),
        ("FLOP utilisation, median", metrics.FLOP_UTILISATION),
    ):
        if not np.isnan(run.median(key)):
            figures[label] = run.median(key)
    if summary := run.summary:
        figures |= {f"unigram entropy, {domain}": value for domain, value in summary.unigram_entropy.items()}
        figures |= {
            "validation loss, mean": summary.mean_validation_loss,
            "unigram entropy, mean": summary.mean_unigram_entropy,
            "seconds": summary.seconds,
            "parameters, total": summary.parameters_total,
            "parameters, active": summary.parameters_active,
            "training FLOPs": summary.flops_per_token * summary.tokens,
            "measured peak FLOP/s of a device": summary.peak_flops,
            "precision": summary.precision,
            "hardware": summary.hardware,
            "commit": summary.git_commit,
        }
    return figures


def header(run: RunRecord) -> str:
    """Name, and cards with the key figures."""
    figures, cards = key_figures(run), []
    for label, key, form in (
        ("validation loss, mean of domains (nats/token)", "validation loss, mean", "{:.3f}"),
        ("unigram entropy of the same text", "unigram entropy, mean", "{:.3f}"),
    ):
        if key in figures:
            cards.append((form.format(figures[key]), label))
    if summary := run.summary:
        cards += [
            (duration(summary.seconds), "of training"),
            (short_number(summary.parameters_total), "parameters in all"),
            (short_number(summary.parameters_active), "active per token, input embedding left out"),
            (summary.precision, "precision of matrix products"),
        ]
    if "tokens" in figures:
        cards.append((short_number(float(figures["tokens"])), f"tokens in {figures['batches']:,} batches"))
    if "tokens/s, median" in figures:
        cards.append((short_number(float(figures["tokens/s, median"])), "tokens/s, median"))
    if "FLOP utilisation, median" in figures:
        cards.append(
            (f"{float(figures['FLOP utilisation, median']):.1%}", "of the measured peak FLOP/s, median")
        )
    grid = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in cards
    )
    where = run.summary.hardware if run.summary else "not complete: figures up to the last step recorded"
    return f'<h1>{html.escape(run.name)}</h1><p>{html.escape(where)}</p><div class="cards">{grid}</div>'


def loss_section(run: RunRecord) -> str:
    """Loss curves, and the last losses of each domain."""
    from train.report.plots import loss_figure

    if not run.series(metrics.LOSS):
        return section("Loss", "<p>No step has been recorded yet.</p>")
    rows = []
    for domain, key in metrics.match_names(metrics.LOSS_VALIDATION, run.keys).items():
        entropy = run.summary.unigram_entropy.get(domain) if run.summary else None
        bits = run.series(metrics.bits_per_byte(domain)).values
        rows.append(
            (
                domain,
                f"{run.series(key).values[-1]:.4f}",
                f"{entropy:.4f}" if entropy is not None else "",
                f"{bits[-1]:.4f}" if len(bits) else "",
            )
        )
    heads = ("domain", "validation loss (nats/token)", "unigram entropy (nats/token)", "bits per byte")
    note = (
        "<p>The unigram entropy is the loss of a model that knows how often each token occurs in the "
        "validation text and nothing of its context.</p>"
    )
    return section("Loss", figure(loss_figure(run)) + note + (table(heads, rows) if rows else ""))


def domain_section(run: RunRecord) -> str:
    """What was read of each domain, and what its part of the last batch cost."""
    rows = []
    for domain, key in metrics.match_names(metrics.DOMAIN_TOKENS, run.keys).items():
        row = [domain, f"{run.series(key).values[-1]:,.0f}"]
        for other, form in (
            (metrics.DOMAIN_SAMPLES, "{:,.0f}"),
            (metrics.DOMAIN_EPOCHS, "{:,.4f}"),
            (metrics.LOSS_DOMAIN, "{:.4f}"),
            (metrics.BITS_PER_BYTE_DOMAIN, "{:.4f}"),
        ):
            values = run.series(metrics.of_domain(other, domain)).values
            row.append(form.format(values[-1]) if len(values) else "")
        rows.append(row)
    heads = ("domain", "tokens", "samples", "epochs", "last training loss (nats/token)", "bits per byte")
    return section("Domains", table(heads, rows)) if rows else ""


def throughput_section(run: RunRecord) -> str:
    """Tokens per second and utilisation."""
    from train.report.plots import throughput_figure

    if not run.series(metrics.TOKENS_PER_SECOND):
        return ""
    peak = ""
    if run.summary:
        peak = (
            f" The peak of a device, {run.summary.peak_flops / 1e12:.2f} TFLOP/s, is that of a large matrix "
            f"product in {run.summary.precision}, measured before the run."
        )
    caption = "Utilisation counts the model's own arithmetic, 6 FLOPs per active parameter and attention."
    return section("Throughput", figure(throughput_figure(run), caption + peak))


def step_time_section(run: RunRecord) -> str:
    """What the median step's time went into."""
    medians = {part: run.median(part) for part in metrics.STEP_PARTS}
    total = sum(medians.values())
    if not total > 0:
        return ""
    bar, rows = [], []
    for (part, seconds), colour in zip(medians.items(), PART_COLOURS, strict=True):
        known = metrics.find_metric(part)
        assert known is not None
        bar.append(f'<div style="background:{colour};width:{seconds / total:.2%}" title="{part}"></div>')
        key = f'<span class="key" style="background:{colour}"></span>{html.escape(part.split("/")[1])}'
        rows.append((Markup(key), known.meaning, f"{seconds * 1e3:,.1f} ms", f"{seconds / total:.1%}"))
    heads = ("part", "meaning", "median", "share")
    return section("Step time", f'<div class="bar">{"".join(bar)}</div>' + table(heads, rows))


def optimisation_section(run: RunRecord) -> str:
    """Learning rate and gradient norm."""
    from train.report.plots import optimisation_figure

    if not run.series(metrics.LEARNING_RATE) or not run.series(metrics.GRADIENT_NORM):
        return ""
    return section(
        "Optimisation", figure(optimisation_figure(run), "Gradient norms are those before clipping.")
    )


def expert_section(run: RunRecord) -> str:
    """Load of the experts over layers and time; nothing for a dense model."""
    from train.report.plots import entropy_figure, load_figure, router_figure

    if run.load_shares.size == 0:
        return ""
    _, layers, experts = run.load_shares.shape
    dead = sum(run.series(metrics.of_layer(metrics.EXPERT_DEAD, layer)).values[-1] for layer in range(layers))
    text = (
        f"{layers} layers of {experts} experts; a balanced expert takes {1 / experts:.2%} of its layer's "
        f"tokens. In the last batch {dead:.0f} of {layers * experts} experts took none."
    )
    panels = (
        figure(
            load_figure(run), "Each row of a panel is an expert: red is busy, blue is idle, pale is balanced."
        )
        + figure(entropy_figure(run), "Each row is a layer.")
        + figure(router_figure(run), "Pale lines are the first layers.")
    )
    return section("Expert load", f"<p>{text}</p>{panels}")


def evaluation_section(run: RunRecord) -> str:
    """Scores of suites and of lm-eval, retrieval, bits per byte; of the newest checkpoint each."""
    from train.report.evaluation import evaluation_tables

    body = evaluation_tables(run)
    return section("Evaluation", body) if body else ""


def sample_section(run: RunRecord) -> str:
    """Text that the model wrote."""
    return section("A sample of text", f"<pre>{html.escape(run.sample)}</pre>") if run.sample else ""


def origin_section(run: RunRecord) -> str:
    """Commit, datasets and packages."""
    if run.summary is None:
        return ""
    datasets = [(d.name, d.context, f"{d.tokens:,}", d.source, d.digest) for d in run.summary.datasets]
    body = f"<p>Commit {html.escape(run.summary.git_commit)}</p>"
    if datasets:
        body += table(("dataset", "read for", "tokens", "place", "SHA-256"), datasets)
    body += "<br>" + table(("package", "version"), list(run.summary.packages.items()))
    return section("Origin", body)


def recipe_section(run: RunRecord) -> str:
    """The resolved recipe."""
    return section("Recipe", f"<pre>{html.escape(run.recipe)}</pre>")


class Markup(str):
    """Text that is HTML already."""


def section(title: str, body: str) -> str:
    """A headed part of the page."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def figure(svg: str, caption: str = "") -> str:
    """A figure with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers are aligned to the right."""
    numeric = [
        any(row[column] for row in rows) and all(NUMBER.fullmatch(row[column]) for row in rows)
        for column in range(len(heads))
    ]

    def kind(cell: str, is_number: bool) -> str:
        plain_long = len(cell) > LONG_CELL and not isinstance(cell, Markup)
        return " class=number" if is_number else " class=long" if plain_long else ""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{kind(cell, is_number)}>{cell if isinstance(cell, Markup) else html.escape(cell)}</{tag}>"
            for cell, is_number in zip(row, numeric, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', heads)}</tr>{body}</table>"


def describe(figures: Mapping[str, float | str]) -> str:
    """Key figures as lines for the console."""
    width = max(len(label) for label in figures)
    return "\n".join(f"{label:{width}}  {as_text(value)}" for label, value in figures.items())


def as_text(value: float | str) -> str:
    """A key figure as text: whole numbers whole, others to four digits and more."""
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 1e5 else f"{value:.4g}"
