"""A plan as one self-contained page: a memory bar per GPU of the first node, and a timeline of one step."""

from html import escape
from pathlib import Path

from launch.plan.hardware import GIB
from launch.plan.memory import Memory, memory
from launch.plan.step import Plan
from launch.plan.text import EXPLANATIONS, format_plan

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
    "hidden": "#fca5a5",
}
KINDS = {
    "matrix": "matrix products",
    "attention": "attention",
    "memory": "memory bandwidth",
    "links": "links between GPUs, open",
}
HIDDEN = {"hidden": "traffic between GPUs that runs behind arithmetic"}
WIDTH, BAR, GAP, LEFT = 900, 22, 8, 90
SHOWN_MICROBATCHES = 4
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
text {{ font-size: 12px; fill: currentColor; }}
pre {{ font-size: 12px; overflow-x: auto; }}
.key span {{ display: inline-block; margin-right: 1rem; white-space: nowrap; }}
.key i {{ display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.3em; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary} Predicted, not measured: none of this was run on a GPU.</p>
<h2>Memory of each GPU of the first node, at its worst moment</h2>
{memory_key}{memory_bars}
<h2>One step, {step_seconds:.2f} s</h2>
{time_key}{timeline}
<h2>Figures</h2>
<pre>{text}</pre>
</body></html>
"""


def write_html(file: Path, plan: Plan) -> None:
    """Writes the page."""
    title = f"{plan.recipe.name} on {plan.world_size} x {plan.gpu.name}"
    verdict = "fits" if plan.fits else "does not fit"
    summary = (
        f"{plan.tokens_per_second_per_gpu:,.0f} tokens per second and GPU, {plan.days:.1f} days; "
        f"the fullest GPU {verdict}: {plan.fullest.memory.total / GIB:.1f} of "
        f"{plan.gpu.memory_bytes / GIB:.1f} GiB."
    )
    page = PAGE.format(
        title=escape(title),
        summary=escape(summary),
        memory_key=_key({name: EXPLANATIONS[name] for name in Memory.parts()}),
        memory_bars=_memory_bars(plan),
        step_seconds=plan.step_seconds,
        time_key=_key(KINDS | HIDDEN),
        timeline=_timeline(plan),
        text=escape(format_plan(plan)),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)


def _memory_bars(plan: Plan) -> str:
    """A bar of all parts for each GPU of the first node, and a line at the GPU's memory."""
    ranks = range(min(plan.gpu.gpus_per_node, plan.world_size))
    of_ranks = [memory(plan.fullest.form.recipe, plan.world_size, plan.imbalance, rank) for rank in ranks]
    scale = (WIDTH - LEFT) / max(plan.gpu.memory_bytes, *(found.total for found in of_ranks)) / 1.08
    shapes = []
    for row, (rank, found) in enumerate(zip(ranks, of_ranks, strict=True)):
        top, left = 20 + row * (BAR + GAP), float(LEFT)
        shapes.append(f'<text x="0" y="{top + 15}">rank {rank}</text>')
        for name in Memory.parts():
            size = getattr(found, name)
            shapes.append(_box(left, top, size * scale, name, f"{name}: {size / GIB:.2f} GiB"))
            left += size * scale
        shapes.append(f'<text x="{left + 6:.1f}" y="{top + 15}">{found.total / GIB:.1f} GiB</text>')
    height = 30 + len(of_ranks) * (BAR + GAP)
    limit = LEFT + plan.gpu.memory_bytes * scale
    shapes.append(
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="14" y2="{height}" stroke="#ef4444" stroke-width="2"/>'
        f'<text x="{limit:.1f}" y="10" text-anchor="end">{plan.gpu.memory_bytes / GIB:.1f} GiB</text>'
    )
    return _svg(height, shapes, "memory by part for each GPU")


def _timeline(plan: Plan) -> str:
    """The first microbatches and the optimizer's step, by what their time goes to."""
    forward, backward, optimizer = plan.parts
    shown = min(plan.microbatches, SHOWN_MICROBATCHES)
    drawn = [part for _ in range(shown) for part in (forward, backward)] + [optimizer]
    total = sum(part.seconds.total for part in drawn)
    scale = (WIDTH - LEFT) / total
    rows = list(KINDS)
    names = [*(KINDS[kind].split()[0] for kind in rows), "overlap"]
    shapes = [f'<text x="0" y="{35 + row * (BAR + GAP)}">{name}</text>' for row, name in enumerate(names)]
    left = float(LEFT)
    for part in drawn:
        width = part.seconds.total * scale
        shapes.append(f'<text x="{left + 2:.1f}" y="12">{part.name if width > 60 else ""}</text>')
        at = left
        for row, kind in enumerate(rows):
            seconds = getattr(part.seconds, kind)
            top = 20 + row * (BAR + GAP)
            title = f"{part.name}, {KINDS[kind]}: {seconds:.3f} s"
            shapes.append(_box(at, top, seconds * scale, kind, title))
            at += seconds * scale
        hidden = plan.hidden_seconds(part.seconds)
        title = f"{part.name}, traffic behind arithmetic: {hidden:.3f} s"
        shapes.append(_box(left, 20 + len(rows) * (BAR + GAP), hidden * scale, "hidden", title))
        left += width
    more = plan.microbatches - shown
    height = 30 + len(names) * (BAR + GAP)
    if more:
        shapes.append(f'<text x="{LEFT}" y="{height + 8}">and {more} more microbatches like these</text>')
        height += 14
    return _svg(height, shapes, "what the time of a step goes to")


def _box(left: float, top: float, width: float, name: str, title: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{max(width, 0):.1f}" height="{BAR}" '
        f'fill="{COLOURS[name]}"><title>{escape(title)}</title></rect>'
    )


def _svg(height: float, shapes: list[str], title: str) -> str:
    body = "\n".join(shapes)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">\n{body}\n</svg>'


def _key(names: dict[str, str]) -> str:
    entries = "".join(
        f'<span><i style="background:{COLOURS[name]}"></i>{name}: {escape(text)}</span>'
        for name, text in names.items()
    )
    return f'<p class="key">{entries}</p>'
