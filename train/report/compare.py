"""Comparison of runs: loss at equal FLOPs, FLOPs at equal loss, as tables, plots and a page.

Runs that share the values of the grouping keys form a family; runs of a family with equal training FLOPs
differ only in their seed. Differences that the figures do not support are reported as not significant.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Model, Recipe
from train.recipe.units import short_number
from train.record import metrics
from train.record.run_folder import RECIPE_FILE
from train.record.tables import text_table
from train.report.cells import Cell, ComparedRun, cells_of
from train.report.run_record import RunRecord, read_run
from train.report.scaling import CONFIDENCE, Advantage, Curve, Runs, advantages, fit_curves

Row = tuple[str, ...]
Table = tuple[Row, list[Row]]
"""Heads and rows."""

UNITS = {"nats": "nats/token", "bits_per_byte": "bits/byte"}


@dataclass(frozen=True)
class Comparison:
    """The comparison of a set of runs."""

    metric: str
    baseline: str
    cells: list[Cell]
    curves: dict[str, Curve]
    """Empty if there are too few budgets for curves."""
    advantages: list[Advantage]
    notes: list[str]
    entries: list[ComparedRun]

    @property
    def unit(self) -> str:
        """Unit of every loss."""
        return UNITS[self.metric]


def read_entries(
    run_dirs: Sequence[Path], *, group: Sequence[str] = (), metric: str = "nats"
) -> list[ComparedRun]:
    """Reads complete runs.

    Args:
        run_dirs: folders of runs.
        group: recipe keys whose values define a family; none: dense, or experts and top-k.
        metric: `nats` per token, or `bits_per_byte`.

    Raises:
        UserError: for a folder that is not a complete run, or runs that cannot be compared.
    """
    entries, tokenizers, domains = [], {}, {}
    for run_dir in run_dirs:
        run = read_run(run_dir)
        recipe = load_recipe(run_dir / RECIPE_FILE)
        if run.summary is None:
            raise UserError("is not complete", file=str(run_dir), remedy="finish it, or omit it")
        losses = run.summary.validation_loss if metric == "nats" else _bits_per_byte(run)
        if not losses:
            raise UserError(f"has no held-out loss in {UNITS[metric]}", file=str(run_dir))
        tokenizers[run.name], domains[run.name] = repr(recipe.tokenizer), tuple(sorted(losses))
        summary = run.summary
        entries.append(
            ComparedRun(
                name=run.name,
                family=_family(recipe, group, run_dir),
                seed=recipe.seed,
                parameters_total=summary.parameters_total,
                parameters_active=summary.parameters_active,
                tokens=summary.tokens,
                flops=summary.flops_per_token * summary.tokens,
                losses=dict(sorted(losses.items())),
                seconds=summary.seconds,
                git_commit=summary.git_commit,
            )
        )
    _refuse_unequal(domains, "held-out domains", "give runs that were validated on the same domains")
    if metric == "nats":
        _refuse_unequal(tokenizers, "tokenizers", "compare them with --metric bits_per_byte")
    return entries


def compare(
    entries: Sequence[ComparedRun], *, baseline: str | None = None, metric: str = "nats"
) -> Comparison:
    """Computes tables, curves and FLOP ratios of runs.

    Args:
        entries: the runs.
        baseline: family to compare the others with; None: the first by name that begins with `dense`, else
            the first.
        metric: metric of the entries' losses.

    Raises:
        UserError: if there is no such family, or only one.
    """
    families = sorted({entry.family for entry in entries})
    if baseline is None:
        baseline = next((family for family in families if family.startswith("dense")), families[0])
    if len(families) < 2:
        raise UserError(
            f"all runs belong to one family, {families[0]}",
            key="--group",
            remedy="name a recipe key in which they differ, for example optimizer.kind",
        )
    if baseline not in families:
        there = ", ".join(families)
        raise UserError(f"families are {there}", key="--baseline", remedy="name one of them")
    ordered = sorted(entries, key=lambda entry: (entry.family != baseline, entry.family, entry.flops))
    runs = Runs(
        tuple(entry.family for entry in ordered),
        np.array([entry.flops for entry in ordered]),
        np.array([list(entry.losses.values()) for entry in ordered]),
        tuple(entry.seed for entry in ordered),
    )
    notes = []
    if min(len(members) for members in runs.cells().values()) < 2:
        notes.append("Some budgets have a single seed: their intervals reflect only the domains.")
    if runs.losses.shape[1] < 5:
        notes.append(
            f"Only {runs.losses.shape[1]} held-out domains: their contribution to intervals is coarse."
        )
    single = [family for family, count in runs.budgets().items() if count < 2]
    on_curves = runs.of(set(runs.families) - set(single))
    if baseline in on_curves.families and len(on_curves.families) > 1:
        notes += [f"{family}: a single FLOP budget, so no curve." for family in single]
    else:
        on_curves = runs
    try:
        curves = fit_curves(on_curves)
        found = advantages(on_curves, _pairs(curves, baseline))
    except UserError as error:
        curves, found = {}, []
        notes.append(f"No curves: {error}.")
    return Comparison(
        metric, baseline, cells_of(ordered, runs, baseline), curves, found, notes, list(ordered)
    )


def write_csv(comparison: Comparison, path: Path) -> None:
    """Writes a CSV file with one line per run."""
    domains = list(comparison.entries[0].losses)
    heads: Row = ("run", "family", "seed", "parameters_total", "parameters_active", "tokens", "flops")
    heads += (*(f"{comparison.metric}_{domain}" for domain in domains), "seconds", "commit")
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(heads)
        for entry in comparison.entries:
            who = (entry.name, entry.family, entry.seed, entry.parameters_total, entry.parameters_active)
            losses = (f"{entry.losses[domain]:.6f}" for domain in domains)
            cost = (f"{entry.seconds:.1f}", entry.git_commit)
            rows.writerow((*who, entry.tokens, f"{entry.flops:.6g}", *losses, *cost))


def as_json(comparison: Comparison) -> str:
    """Returns all figures as JSON."""
    tree = asdict(comparison)
    tree["cells"] = [asdict(cell) | {"verdict": cell.verdict} for cell in comparison.cells]
    tree["advantages"] = [asdict(it) | {"verdict": it.verdict} for it in comparison.advantages]
    return json.dumps(_finite(tree), indent=1) + "\n"


def cell_rows(comparison: Comparison) -> Table:
    """Returns heads and rows of the table of runs, in the layout of Table 5 of DBRX's announcement."""
    heads: Row = ("model", "total", "active", "tokens", "FLOPs", "relative", "seeds", comparison.unit)
    heads += (f"less {comparison.baseline}", f"{CONFIDENCE:.0%} interval", "")
    rows: list[Row] = []
    for cell in comparison.cells:
        spread = "" if np.isnan(cell.loss_error) else f" ± {cell.loss_error:.4f}"
        interval = f"{cell.interval[0]:+.4f} to {cell.interval[1]:+.4f}" if cell.interval else ""
        rows.append(
            (
                cell.family,
                short_number(cell.parameters_total),
                short_number(cell.parameters_active),
                short_number(cell.tokens),
                f"{cell.flops:.3g}",
                f"{cell.relative_flops:.2f}x",
                str(cell.seeds),
                f"{cell.loss:.4f}{spread}",
                "" if cell.difference is None else f"{cell.difference:+.4f}",
                interval,
                cell.verdict,
            )
        )
    return heads, rows


def advantage_rows(comparison: Comparison) -> Table:
    """Returns heads and rows of the table of FLOP ratios."""
    heads: Row = (
        "family",
        "against",
        f"at {comparison.unit}",
        "FLOPs fewer by",
        f"{CONFIDENCE:.0%} interval",
        "",
    )
    rows: list[Row] = [
        (
            it.family,
            it.baseline,
            f"{it.level:.4f}",
            f"{it.ratio:.2f}x",
            f"{it.low:.2f}x to {it.high:.2f}x",
            it.verdict + (", extrapolated" if it.is_extrapolated else ""),
        )
        for it in comparison.advantages
    ]
    return heads, rows


def format_comparison(comparison: Comparison) -> str:
    """Formats both tables for a terminal."""
    parts = [_columns(*cell_rows(comparison))]
    if comparison.advantages:
        parts.append(_columns(*advantage_rows(comparison)))
        lines = [
            f"{family}: L(C) = {curve.irreducible:.4f} + {curve.amplitude:.4f} (C / {curve.unit:.3g})"
            f"^-{curve.exponent:.4f}"
            for family, curve in comparison.curves.items()
        ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *comparison.notes])


def _columns(heads: Row, rows: list[Row]) -> str:
    return text_table(heads, rows, "<" + ">" * (len(heads) - 1))


def _pairs(curves: dict[str, Curve], baseline: str) -> list[tuple[str, str]]:
    """Pairs each family with the baseline, the best first, then each with the next best."""
    level = float(curves[baseline].loss(curves[baseline].range_flops[1]))
    ranked = sorted((family for family in curves if family != baseline), key=lambda f: curves[f].flops(level))
    return [(family, baseline) for family in ranked] + list(pairwise(ranked))


def _family(recipe: Recipe, group: Sequence[str], run_dir: Path) -> str:
    if not group:
        return family_of(recipe.model)
    try:
        values = [reduce(getattr, key.split("."), recipe) for key in group]
    except AttributeError as error:
        raise UserError(f"the recipe has no such key ({error})", key="--group", file=str(run_dir)) from None
    return ", ".join(
        f"{key.rsplit('.', 1)[-1]}={_plain(value)}" for key, value in zip(group, values, strict=True)
    )


def family_of(model: Model) -> str:
    """Returns a model's default family: `dense`, or `16 experts, top-4`."""
    if model.moe is None:
        return "dense"
    forced = ", forced balance" if model.moe.forced_balance else ""
    return f"{model.moe.experts} experts, top-{model.moe.top_k}{forced}"


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _bits_per_byte(run: RunRecord) -> dict[str, float]:
    keys = metrics.match_names(metrics.BITS_PER_BYTE, run.keys)
    return {domain: float(run.series(key).values[-1]) for domain, key in keys.items()}


def _refuse_unequal(values: dict[str, Any], what: str, remedy: str) -> None:
    first = next(iter(values), None)
    for name, value in values.items():
        if first is not None and value != values[first]:
            raise UserError(f"{first} and {name} have different {what}", key="--compare", remedy=remedy)


def _finite(tree: Any) -> Any:
    """Replaces infinity and NaN by None, as JSON has neither."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree
