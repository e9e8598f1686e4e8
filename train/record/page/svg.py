"""Figures as inline SVG, readable in light and dark mode.

Ink is the page's text colour; curves have colours of medium brightness.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#0ea5a4", "#d4a017", "#ec4899")
INK = "#0a0b0c"
"""Placeholder for the page's text colour until the SVG is written."""
WIDTH_INCHES = 9.0

STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a domain may be called $x$
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}
"""Matplotlib settings for every figure."""


def draw_svg(
    title: str,
    draw: Callable[[Sequence[Any]], None],
    heights: tuple[float, ...],
    columns: int = 1,
    bottom: str = "million tokens",
) -> Markup:
    """Draws on new axes and returns inline SVG without external references.

    Without Matplotlib, which an installation may leave out, a line of text stands for the figure.

    Args:
        title: text alternative for screen readers.
        draw: draws on the axes, given row by row.
        heights: height of each row in inches.
        columns: axes per row.
        bottom: label of the x axis at the bottom of a single column.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return Markup("<p>{}: charts need Matplotlib, which this installation leaves out</p>").format(title)
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.35), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(
            len(heights), columns, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        draw(list(grid.ravel()))
        if columns == 1:
            grid[-1, 0].set_xlabel(bottom)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(stream.getvalue(), title)


def inline_svg(svg: str, title: str) -> Markup:
    """Turns an SVG file into an element of a page: no prologue, no namespaces, the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href").replace(INK, "currentColor")
    )
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def log_scale(axis: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
