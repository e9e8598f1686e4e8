"""The report page of a run, in a single self-contained file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from train.recipe.units import duration, short_number
from train.record import metrics
from train.record.page.rendering import render
from train.record.page.svg import Mark
from train.record.run_folder import LOAD_PICTURE_FILE, REPORT_FILE
from train.record.skips import names_of
from train.report.evaluation import newest_evaluations, scores_over_time
from train.report.goodput import goodput
from train.report.marks import kinds_of, marks_of, step_places
from train.report.progress import progress_of
from train.report.run_record import RunRecord, read_run

COMMIT = "commit"
PART_COLOURS = ("#ef4444", "#3b82f6", "#a855f7", "#10b981", "#94a3b8")


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` from the files in a run's folder; the run need not be complete.

    The page of a run that is being trained loads itself again every minute; `--follow` rewrites it. The heat
    map of the experts' load is also left as a picture, for MLflow.

    Raises:
        UserError: if it is not the folder of a run.
    """
    run = read_run(run_dir)
    path = run_dir / REPORT_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(report_page(run))
    partial.replace(path)
    if run.load_shares.size:
        from train.report.plots import write_load_picture

        write_load_picture(run, run_dir / LOAD_PICTURE_FILE)
    return path


def report_page(run: RunRecord) -> str:
    """Returns the page as HTML, without the sections for which the run has no data."""
    marks = marks_of(run)
    return render(
        "train/report/run.html.j2",
        title=f"Run {run.name}",
        run=run,
        progress=progress_of(run),
        key_cards=key_cards(run),
        figures=figures(run, marks),
        validation=validation_rows(run),
        domains=domain_rows(run),
        changes=change_rows(run),
        mark_kinds=kinds_of(marks),
        step_places=step_places(run),
        alarms=alarm_rows(run),
        step_parts=step_parts(run),
        experts=expert_counts(run),
        scores_figure=scores_over_time(run),
        evaluations=newest_evaluations(run),
        datasets=[(d.name, d.context, f"{d.tokens:,}", d.source, d.digest) for d in run.summary.datasets]
        if run.summary
        else [],
    )


def key_figures(run: RunRecord) -> dict[str, float | str]:
    """Returns the key figures of a run, without those not known yet."""
    figures: dict[str, float | str] = {
        "name": run.name,
        "status": "complete" if run.summary else "not complete",
    }
    if progress := progress_of(run):
        figures["progress"] = str(progress)
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
            COMMIT: summary.git_commit,
        }
        share = goodput(run.run_dir, summary)
        if share is not None:
            figures["goodput"] = share
    return figures


def key_cards(run: RunRecord) -> list[tuple[str, str]]:
    """Returns the key figures for the top of the page, each with its label."""
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
            (short_number(summary.parameters_total), "parameters in total"),
            (short_number(summary.parameters_active), "active per token, without the input embedding"),
            (summary.precision, "precision of matrix products"),
        ]
    if "goodput" in figures:
        cards.append(
            (f"{float(figures['goodput']):.1%}", "goodput: training over all time since the first start")
        )
    if "tokens" in figures:
        cards.append((short_number(float(figures["tokens"])), f"tokens in {figures['batches']:,} batches"))
    if "tokens/s, median" in figures:
        cards.append((short_number(float(figures["tokens/s, median"])), "tokens/s, median"))
    if "FLOP utilisation, median" in figures:
        cards.append(
            (f"{float(figures['FLOP utilisation, median']):.1%}", "of the measured peak FLOP/s, median")
        )
    return cards


def figures(run: RunRecord, marks: Sequence[Mark]) -> dict[str, Markup | None]:
    """Draws the figure of each section with a run's events; None if the run has no data for it."""
    from train.report import plots

    has_experts = run.load_shares.size > 0
    has_rate = bool(run.series(metrics.LEARNING_RATE)) and bool(run.series(metrics.GRADIENT_NORM))
    return {
        "loss": plots.loss_figure(run, marks) if run.steps else None,
        "throughput": plots.throughput_figure(run, marks) if run.series(metrics.TOKENS_PER_SECOND) else None,
        "optimisation": plots.optimisation_figure(run, marks) if has_rate else None,
        "load": plots.load_figure(run) if has_experts else None,
        "entropy": plots.entropy_figure(run) if has_experts else None,
        "router": plots.router_figure(run, marks) if has_experts else None,
        "memory": plots.memory_figure(run, marks) if run.series(metrics.PROCESS_MEMORY) else None,
        "sensors": plots.sensors_figure(run, marks) if run.series(metrics.GPU_POWER) else None,
        "layers": plots.layers_figure(run, marks) if run.layers_measured else None,
    }


def validation_rows(run: RunRecord) -> Sequence[tuple[str, ...]]:
    """Returns each domain's newest validation loss, unigram entropy and bits per byte."""
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
    return rows


def domain_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Returns the tokens read of each domain and its loss in the last batch."""
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
        rows.append(tuple(row))
    return rows


def change_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Returns each changed key of the recipe: after which batch and tokens, when, why, from what to what."""
    rows: list[tuple[str, ...]] = []
    for change in run.changes:
        place = f"{change.batch:,}", short_number(change.tokens), change.time
        why = f"{change.run}: fork of {change.fork_of}" if change.fork_of else f"{change.run}: resumed"
        for each in change.keys:
            rows.append((*place, why, each.key, _as_yaml(each.before), _as_yaml(each.now)))
        if not change.keys:
            rows.append((*place, why, "nothing", "", ""))
    return rows


def alarm_rows(run: RunRecord) -> list[tuple[str, ...]]:
    """Returns each alarm: its step, reasons and action, and the documents of which the step read most."""
    return [
        (f"{alarm.step:,}", "; ".join(alarm.reasons), alarm.action, names_of(alarm.documents))
        for alarm in run.alarms
    ]


def _as_yaml(value: object) -> str:
    return "null" if value is None else str(value)


def step_parts(run: RunRecord) -> list[dict[str, str]]:
    """Returns the parts of the median step; none before a step was timed."""
    medians = {part: run.median(part) for part in metrics.STEP_PARTS}
    total = sum(medians.values())
    if not total > 0:
        return []
    parts = []
    for (part, seconds), colour in zip(medians.items(), PART_COLOURS, strict=True):
        known = metrics.find_metric(part)
        assert known is not None
        parts.append(
            {
                "name": part.split("/")[1],
                "meaning": known.meaning,
                "colour": colour,
                "median": f"{seconds * 1e3:,.1f} ms",
                "share": f"{seconds / total:.1%}",
            }
        )
    return parts


def expert_counts(run: RunRecord) -> dict[str, int] | None:
    """Counts layers, experts per layer and experts idle in the last batch; None for a dense model."""
    if run.load_shares.size == 0:
        return None
    _, layers, experts = run.load_shares.shape
    dead = sum(run.series(metrics.of_layer(metrics.EXPERT_DEAD, layer)).values[-1] for layer in range(layers))
    return {"layers": layers, "each": experts, "dead": round(dead)}


def describe(figures: Mapping[str, float | str]) -> str:
    """Formats key figures as lines for the console."""
    width = max(len(label) for label in figures)
    return "\n".join(f"{label:{width}}  {as_text(value)}" for label, value in figures.items())


def as_text(value: float | str) -> str:
    """Formats a key figure: integers in full, others with at least four digits."""
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) < 1e5 else f"{value:.4g}"
