"""The comparison of runs as a self-contained page, and its figure as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.record.page.rendering import render
from train.record.page.svg import COLOURS, STYLE, draw_svg
from train.report.compare import Comparison, advantage_rows, cell_rows

CURVE_POINTS = 200
FLOPS = "training FLOPs"
BEYOND = 3.0
"""Factor of FLOPs by which a curve is drawn (dashed) beyond its runs."""


def write_page(comparison: Comparison, path: Path) -> None:
    """Writes the page, without external resources."""
    path.write_text(comparison_page(comparison))


def comparison_page(comparison: Comparison) -> str:
    """Returns the page as HTML."""
    title = "Loss against training FLOPs"
    domains = list(comparison.entries[0].losses)
    return render(
        "train/report/compare.html.j2",
        title=title,
        comparison=comparison,
        domains=domains,
        curves=draw_svg(title, _drawing(comparison), heights=(4.2,), bottom=FLOPS),
        advantages=advantage_rows(comparison),
        cells=cell_rows(comparison),
        by_domain=[
            (cell.family, f"{cell.flops:.3g}", *(f"{cell.by_domain[domain]:.4f}" for domain in domains))
            for cell in comparison.cells
        ],
    )


def write_png(comparison: Comparison, path: Path) -> None:
    """Writes the figure for documents, on white."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(9.0, 4.5), layout="constrained")
        FigureCanvasAgg(picture)
        axis = picture.subplots()
        _drawing(comparison)([axis])
        axis.set_xlabel(FLOPS)
        picture.savefig(path, dpi=130)


def _drawing(comparison: Comparison) -> Any:
    from matplotlib.ticker import FuncFormatter

    def draw(axes: Sequence[Any]) -> None:
        (axis,) = axes
        families = list(dict.fromkeys(entry.family for entry in comparison.entries))
        for family, colour in zip(families, COLOURS * len(families), strict=False):
            runs = [entry for entry in comparison.entries if entry.family == family]
            flops = [entry.flops for entry in runs]
            means = [float(np.mean(list(entry.losses.values()))) for entry in runs]
            axis.plot(flops, means, "o", color=colour, markersize=4, alpha=0.8, label=family)
            if curve := comparison.curves.get(family):
                low, high = curve.range_flops
                inside = np.geomspace(low, high, CURVE_POINTS)
                axis.plot(inside, curve.loss(inside), color=colour)
                for ends in ((low / BEYOND, low), (high, high * BEYOND)):
                    outside = np.geomspace(*ends, CURVE_POINTS)
                    axis.plot(outside, curve.loss(outside), color=colour, linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("+", "")))
        axis.set_ylabel(comparison.unit)
        axis.legend(ncols=2)

    return draw
