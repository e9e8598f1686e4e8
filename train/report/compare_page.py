"""The comparison of runs as one self-contained page, and its figure as PNG."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.report.compare import Comparison, advantage_rows, cell_rows
from train.report.plots import COLOURS, STYLE, render
from train.report.run_page import PAGE, figure, section, table

CURVE_POINTS = 200
FLOPS = "training FLOPs"
BEYOND = 3.0
"""How far a curve is drawn beyond its runs, as a factor of FLOPs; dashed there."""


def write_page(comparison: Comparison, path: Path) -> None:
    """Writes the page; it loads nothing from anywhere."""
    title = "Loss against training FLOPs"
    caption = "A point is a run; dashed: extrapolated."
    svg = render(title, _drawing(comparison), heights=(4.2,), bottom=FLOPS)
    body = [
        f"<h1>{title}</h1><p>Held-out loss in {comparison.unit}, the mean of "
        f"{html.escape(', '.join(comparison.entries[0].losses))}.</p>",
        section("Curves", figure(svg, caption)),
    ]
    if comparison.advantages:
        text = (
            "<p>FLOPs of the second family over those of the first at the loss that the second reaches "
            "with its most. The interval is a bootstrap over seeds and held-out domains; one that holds "
            "1 tells nothing apart.</p>"
        )
        body.append(section("FLOPs at equal loss", text + table(*advantage_rows(comparison))))
    body.append(section("Runs", table(*cell_rows(comparison))))
    domains = list(comparison.entries[0].losses)
    rows = [
        (cell.family, f"{cell.flops:.3g}", *(f"{cell.by_domain[d]:.4f}" for d in domains))
        for cell in comparison.cells
    ]
    body.append(section("By domain", table(("model", "FLOPs", *domains), rows)))
    if comparison.notes:
        body.append(section("Notes", "".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes)))
    path.write_text(PAGE.format(title=title, body="\n".join(body)))


def write_png(comparison: Comparison, path: Path) -> None:
    """Writes the figure for a document, on white."""
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
        axis.set_ylabel(comparison.unit)
        axis.legend(ncols=2)

    return draw
