"""Figures as inline SVG, readable in light and dark mode.

Ink is the page's text colour; curves have colours of medium brightness. `charts.js` next to this file shows
the values under the pointer and zooms, on a page that includes it.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#0ea5a4", "#d4a017", "#ec4899")
INK = "#0a0b0c"
"""Placeholder for the page's text colour until the SVG is written."""
WIDTH_INCHES = 9.0
POINTS_PER_INCH = 72
"""Matplotlib's units of an SVG."""

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
    "path.simplify": False,  # every vertex is a value that charts.js shows
}
"""Matplotlib settings for every figure."""


@dataclass(frozen=True)
class Mark:
    """Something that happened in a run, drawn as a vertical line."""

    tokens: float
    """Tokens trained before it, in millions."""
    text: str
    colour: str
    height: float = 1.0
    """Share of the chart's height."""


def draw_svg(
    title: str,
    draw: Callable[[Sequence[Any]], None],
    heights: tuple[float, ...],
    columns: int = 1,
    bottom: str = "million tokens",
    marks: Sequence[Mark] | None = None,
) -> Markup:
    """Draws on new axes and returns inline SVG without external references.

    Without Matplotlib, which an installation may leave out, a line of text stands for the figure.

    Args:
        title: text alternative for screen readers.
        draw: draws on the axes, given row by row.
        heights: height of each row in inches.
        columns: axes per row.
        bottom: label of the x axis at the bottom of a single column.
        marks: events, drawn on every axis of a chart over tokens, which `charts.js` then zooms. None: a still
            picture.
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
        shown = [axis for axis in grid.ravel() if axis.axison] if marks is not None else []
        key = hashlib.sha256(title.encode()).hexdigest()[:8]
        named = [_name_parts(axis, f"{key}-{n}", marks or ()) for n, axis in enumerate(shown)]
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        chart = [_place(axis) | parts for axis, parts in zip(shown, named, strict=True)]
    return inline_svg(stream.getvalue(), title, json.dumps(chart) if chart else "")


def _name_parts(axis: Any, key: str, marks: Sequence[Mark]) -> dict[str, Any]:
    """Draws the marks, and gives ids to what moves when a chart is zoomed.

    A line without a label is called what its axis is; `_` before a label keeps it out of the legend.

    Args:
        axis: axes with everything drawn.
        key: beginning of the ids.
        marks: see :func:`draw_svg`.

    Returns:
        Ids, labels and colours of lines, of levels, which are lines and texts at one height, and of marks.
    """
    from matplotlib.colors import to_hex

    lines, levels = [], []
    for line in axis.lines:
        label = str(line.get_label())
        if line.get_transform() == axis.transData:
            label = axis.get_ylabel() if label.startswith("_child") else label.lstrip("_")
            lines.append({"id": line, "label": label, "colour": to_hex(line.get_color())})
        elif line.get_transform() == axis.get_yaxis_transform(which="grid"):
            levels.append({"id": line, "y": float(line.get_ydata()[0])})
    levels += [{"id": text, "y": float(text.xy[1])} for text in axis.texts if hasattr(text, "xy")]
    first, last = axis.get_xlim()
    drawn = [
        {
            "id": axis.axvline(
                mark.tokens,
                ymax=mark.height,
                color=mark.colour,
                linewidth=1.0 if mark.height == 1 else 2.0,
                linestyle=(0, (4, 3)) if mark.height == 1 else "-",
                alpha=0.8,
            ),
            "x": mark.tokens,
            "text": mark.text,
            "colour": mark.colour,
        }
        for mark in marks
        if first <= mark.tokens <= last
    ]
    axis.set_xlim(first, last)
    axis.set_gid(key)
    for place, part in enumerate([*lines, *levels, *drawn]):
        part["id"].set_gid(f"{key}-{place}")
        part["id"] = f"{key}-{place}"
    zooms = not axis.images
    return {"id": key, "lines": lines, "levels": levels, "marks": drawn, "zooms": zooms}


def _place(axis: Any) -> dict[str, Any]:
    """Returns the place of axes in the SVG, from its left and top, and their ranges; needs the layout."""
    width, height = (float(inches) * POINTS_PER_INCH for inches in axis.figure.get_size_inches())
    box = axis.get_position()
    return {
        "box": [box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height],
        "x": list(axis.get_xlim()),
        "y": list(axis.get_ylim()),
        "log": axis.get_yscale() == "log",
    }


def inline_svg(svg: str, title: str, chart: str = "") -> Markup:
    """Turns an SVG file into an element of a page: no prologue, no namespaces, the page's ink.

    Args:
        svg: the file.
        title: text alternative for screen readers.
        chart: what `charts.js` reads; empty: a still picture.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href").replace(INK, "currentColor")
    )
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    data = f' data-chart="{escape(chart)}"' if chart else ""
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"{data}', 1))


def log_scale(axis: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
