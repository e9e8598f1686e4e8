"""Any runs laid over each other, complete or not, and the difference of their recipes: one page."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.record import metrics
from train.record.changes import NOT_TRAINED, keys_of
from train.record.page.rendering import Shortened, render
from train.record.page.svg import COLOURS, draw_svg, log_scale
from train.record.run_folder import RECIPE_FILE
from train.report.plots import millions, smoothed, thinned
from train.report.run_page import COMMIT, as_text, key_figures
from train.report.run_record import RunRecord, read_run

OVERLAY_FILE = "overlay.html"
COMMIT_CHARACTERS = 10
DASHES = ((5, 2.5), (2, 2), (7, 2, 2, 2))
"""Lines of runs that repeat an earlier one's steps, in units of their width."""
Rows = list[tuple[str, ...]]


def write_overlay(run_dirs: Sequence[Path], path: Path) -> None:
    """Writes the page of some runs, without external resources.

    Raises:
        UserError: if one of them is not the folder of a run, or fewer than two are given.
    """
    if len(run_dirs) < 2:
        raise UserError("one run given", key="--compare", remedy="give two or more")
    path.write_text(overlay_page([read_run(run_dir) for run_dir in run_dirs]))


def overlay_page(runs: Sequence[RunRecord]) -> str:
    """Returns the page as HTML."""
    names = _names(runs)
    return render(
        "train/report/overlay.html.j2",
        title=" and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        names=names,
        entries=[(name, colour, "") for name, colour in zip(names, cycle(COLOURS), strict=False)],
        loss=loss_figure(runs, names),
        optimisation=_lines(runs, names, (metrics.LEARNING_RATE, metrics.GRADIENT_NORM)),
        throughput=_lines(runs, names, (metrics.TOKENS_PER_SECOND, metrics.FLOP_UTILISATION)),
        differences=recipe_differences(runs),
        figures=figure_rows(runs),
    )


def loss_figure(runs: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    """Draws each run's training loss, smoothed, and below it the validation loss, mean of its domains."""

    def draw(axes: Sequence[Any]) -> None:
        for run, name, style in zip(runs, names, _styles(runs), strict=True):
            training = thinned(run.series(metrics.LOSS))
            axes[0].plot(millions(training), smoothed(training.values), label=name, **style)
            tokens, means = validation_means(run)
            axes[1].plot(tokens, means, marker="o", markersize=4, label=name, **style)
        axes[0].set_ylabel("training, nats/token")
        axes[1].set_ylabel("validation, nats/token")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)

    return draw_svg("Training and validation loss over tokens", draw, heights=(3.2, 2.4), marks=())


def validation_means(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Returns million tokens and mean validation loss of the evaluations that had every domain."""
    keys = list(metrics.match_names(metrics.LOSS_VALIDATION, run.keys).values())
    if not keys:
        return np.array([]), np.array([])
    by_domain = [run.series(key) for key in keys]
    shared = sorted(set.intersection(*(set(series.tokens) for series in by_domain)))
    at = [dict(zip(series.tokens, series.values, strict=True)) for series in by_domain]
    return np.array(shared) / 1e6, np.array([np.mean([values[t] for values in at]) for t in shared])


def recipe_differences(runs: Sequence[RunRecord]) -> Rows:
    """Returns the keys by which the runs' recipes differ, each with every run's value."""
    recipes = [keys_of(load_recipe(run.run_dir / RECIPE_FILE)) for run in runs]
    keys = sorted(set().union(*recipes) - set(NOT_TRAINED))
    rows = [(key, *(_plain(recipe, key) for recipe in recipes)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def figure_rows(runs: Sequence[RunRecord]) -> Rows:
    """Returns the runs' key figures next to each other."""
    figures = [key_figures(run) for run in runs]
    labels = dict.fromkeys(label for each in figures for label in each if label != "name")
    return [(label, *(_figure(each, label) for each in figures)) for label in labels]


def _figure(figures: dict[str, float | str], label: str) -> str:
    text = as_text(figures.get(label, ""))
    return Shortened(text, COMMIT_CHARACTERS) if label == COMMIT else text


def _lines(runs: Sequence[RunRecord], names: Sequence[str], keys: tuple[str, str]) -> Markup | None:
    """Draws two figures over tokens, a line for each run; None if no run has them."""
    if not any(run.series(key) for run in runs for key in keys):
        return None
    known = [metrics.find_metric(key) for key in keys]

    def draw(axes: Sequence[Any]) -> None:
        for axis, key, metric in zip(axes, keys, known, strict=True):
            for run, name, style in zip(runs, names, _styles(runs), strict=True):
                series = thinned(run.series(key))
                axis.plot(millions(series), smoothed(series.values), label=name, **style)
            assert metric is not None
            axis.set_ylabel(_label(key) if metric.unit == "1" else metric.unit)
            if key == metrics.GRADIENT_NORM:
                log_scale(axis)

    title = " and ".join(_label(key) for key in keys)
    return draw_svg(f"{title.capitalize()} over tokens", draw, heights=(1.8, 1.8), marks=())


def _styles(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Returns the lines of the runs: thin dashes for one that repeats steps of an earlier, as a fork does."""
    steps = [set(zip((loss := run.series(metrics.LOSS)).tokens, loss.values, strict=True)) for run in runs]
    dashes, styles = cycle(DASHES), []
    for place, (own, colour) in enumerate(zip(steps, cycle(COLOURS), strict=False)):
        repeats = any(len(own & earlier) > 1 for earlier in steps[:place])
        line = {"linestyle": (0, next(dashes))} if repeats else {"linewidth": 2.2}
        styles.append({"color": colour, **line})
    return styles


def _label(key: str) -> str:
    return key.rsplit("/", 1)[-1].replace("_", " ")


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the runs' names; folders, where two have the same."""
    names = [run.name for run in runs]
    return [str(run.run_dir) if names.count(run.name) > 1 else run.name for run in runs]


def _plain(recipe: dict[str, Any], key: str) -> str:
    if key not in recipe:
        return "not read"
    return "null" if recipe[key] is None else str(recipe[key])
