"""A plan as a self-contained page: a memory bar per GPU of the first node and the timeline of a step."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from launch.plan.goodput import Goodput
from launch.plan.hardware import GIB
from launch.plan.memory import Memory
from launch.plan.stages import memory_of
from launch.plan.step import Plan
from launch.plan.text import EXPLANATIONS, format_plan
from train.recipe.units import duration
from train.record.page.rendering import render

COLOURS = {
    "weights": "#3b82f6",
    "gradients": "#0ea5a4",
    "optimizer": "#a855f7",
    "activations": "#f97316",
    "loss": "#d4a017",
    "gathered": "#10b981",
    "exchanged": "#ec4899",
    "fragmentation": "#94a3b8",
    "reserved": "#64748b",
    "matrix": "#3b82f6",
    "attention": "#a855f7",
    "memory": "#f97316",
    "links": "#ef4444",
    "idle": "#94a3b8",
    "overlap": "#fca5a5",
}
KINDS = {
    "matrix": "matrix products",
    "attention": "attention",
    "memory": "memory bandwidth",
    "links": "links between GPUs, exposed",
    "idle": "waits for other stages",
}
HIDDEN = {"overlap": "traffic between GPUs that overlaps with arithmetic"}
WIDTH, BAR, GAP, LEFT = 900, 22, 8, 90
SHOWN_MICROBATCHES = 4
MOST_TICKS = 9


@dataclass(frozen=True)
class Box:
    """A rectangle in the drawing's units."""

    left: float
    top: float
    width: float
    colour: str
    title: str
    """The tooltip."""


@dataclass(frozen=True)
class Label:
    """A text of the drawing; ``base`` is the height of its baseline."""

    left: float
    base: float
    text: str
    anchor: str = "start"


@dataclass
class Drawing:
    """Rows of boxes with labels."""

    height: float
    boxes: list[Box] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    limit: float = 0.0
    """Position of the vertical limit line; 0 for none."""
    ticks: list[float] = field(default_factory=list)
    """Positions of the vertical lines of a time axis."""
    foot: float = 0.0
    """Lower end of these lines."""


def write_html(file: Path, plan: Plan, kept: Goodput | None = None) -> None:
    """Writes the plan's page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(plan_page(plan, kept))


def plan_page(plan: Plan, kept: Goodput | None = None) -> str:
    """Returns the page as HTML, with the goodput that interruptions leave; None: at published rates."""
    return render(
        "launch/plan/plan.html.j2",
        title=f"{plan.recipe.name} on {plan.world_size} x {plan.gpu.name}",
        plan=plan,
        duration=duration(plan.days * 86400),
        gib=GIB,
        width=WIDTH,
        bar=BAR,
        memory_key=_key({name: EXPLANATIONS[name] for name in Memory.parts()}),
        memory=_memory_bars(plan),
        time_key=_key(KINDS | HIDDEN),
        timeline=_timeline(plan),
        text=format_plan(plan, kept),
    )


def _memory_bars(plan: Plan) -> Drawing:
    """Draws a memory bar for each GPU of the first node and a line at the GPU's memory."""
    ranks = range(min(plan.gpu.gpus_per_node, plan.world_size))
    of_ranks = [memory_of(plan.fullest.shape.recipe, plan.world_size, plan.imbalance, rank) for rank in ranks]
    scale = (WIDTH - LEFT) / max(plan.gpu.memory_bytes, *(found.total for found in of_ranks)) / 1.08
    drawing = Drawing(30 + len(of_ranks) * (BAR + GAP), limit=LEFT + plan.gpu.memory_bytes * scale)
    for row, (rank, found) in enumerate(zip(ranks, of_ranks, strict=True)):
        top, left = 20 + row * (BAR + GAP), float(LEFT)
        drawing.labels.append(Label(0, top + 15, f"rank {rank}"))
        for name in Memory.parts():
            size = getattr(found, name)
            title = f"{name}: {size / GIB:.2f} GiB"
            drawing.boxes.append(Box(left, top, size * scale, COLOURS[name], title))
            left += size * scale
        drawing.labels.append(Label(left + 6, top + 15, f"{found.total / GIB:.1f} GiB"))
    drawing.labels.append(Label(drawing.limit, 10, f"{plan.gpu.memory_bytes / GIB:.1f} GiB", "end"))
    return drawing


def _timeline(plan: Plan) -> Drawing:
    """Draws the first microbatches, sums over ranks and the optimizer step, by kind of work."""
    forward, backward, *once = plan.parts
    shown = min(plan.microbatches, SHOWN_MICROBATCHES)
    drawn = [part for _ in range(shown) for part in (forward, backward)] + once
    total = sum(part.seconds.total for part in drawn)
    scale = (WIDTH - LEFT) / total
    names = [*KINDS, *HIDDEN]
    tops = [20 + row * (BAR + GAP) for row in range(len(names))]
    drawing = Drawing(30 + len(names) * (BAR + GAP))
    drawing.labels += [Label(0, top + 15, name) for top, name in zip(tops, names, strict=True)]
    left = float(LEFT)
    for part in drawn:
        width = part.seconds.total * scale
        if width > 60:
            drawing.labels.append(Label(left + 2, 12, part.name))
        at = left
        for top, kind in zip(tops, KINDS, strict=False):
            seconds = getattr(part.seconds, kind)
            title = f"{part.name}, {KINDS[kind]}: {seconds:.3f} s"
            drawing.boxes.append(Box(at, top, seconds * scale, COLOURS[kind], title))
            at += seconds * scale
        hidden = part.hidden_seconds
        title = f"{part.name}, traffic overlapped with arithmetic: {hidden:.3f} s"
        drawing.boxes.append(Box(left, tops[-1], hidden * scale, COLOURS["overlap"], title))
        left += width
    _add_time_axis(drawing, total, scale)
    if more := plan.microbatches - shown:
        text = f"{more} more microbatches, before the optimizer's step, are not drawn and not in these times"
        drawing.labels.append(Label(LEFT, drawing.height + 8, text))
        drawing.height += 14
    return drawing


def _add_time_axis(drawing: Drawing, seconds: float, scale: float) -> None:
    """Adds vertical lines with their times in ms below the rows; `scale` is the width of a second."""
    power = 10.0 ** math.floor(math.log10(seconds * 1e3 / MOST_TICKS))
    step = next(
        step for step in (power, 2 * power, 5 * power, 10 * power) if seconds * 1e3 <= step * MOST_TICKS
    )
    drawing.foot = drawing.height - GAP
    drawing.height += 12
    drawing.labels.append(Label(0, drawing.foot + 16, "time, ms"))
    for tick in range(int(seconds * 1e3 / step) + 1):
        place = LEFT + tick * step / 1e3 * scale
        anchor = "middle" if place < WIDTH - 30 else "end"
        drawing.ticks.append(place)
        drawing.labels.append(Label(place, drawing.foot + 16, f"{tick * step:,.12g}", anchor))


def _key(names: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(name, COLOURS[name], "" if text == name else text) for name, text in names.items()]
