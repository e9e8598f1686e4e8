"""Results of the registered plan: `python -m launch.experiments.efficiency`.

Reads the record of `python -m launch.experiments.ladder yamls/ladder-efficiency.yaml`, keeps a copy of it in
the docs, and writes tables and figure of docs/efficiency.md, as docs/efficiency-plan.md says. It may be given
while runs are still missing; then the page says so.
"""

import math
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from launch.experiments.ladder.judgement import (
    Quantity,
    SizeRuns,
    bend,
    flop_ratio,
    holm,
    line,
    pooled,
    ranks,
    slope_through,
    welch,
)
from launch.experiments.ladder.results import RunResult, read_results_file
from train.recipe.errors import UserError
from train.record.command import Figures, command
from train.record.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "runs/efficiency/runs.csv"
DOCS = ROOT / "docs"
PAGE, TABLE, PICTURE = "efficiency.md", "efficiency.csv", "efficiency.png"
BEGIN, END = "<!-- launch.experiments.efficiency: begin -->", "<!-- end -->"
SIZES, SEEDS = ("s", "m"), 20
GRANULARITY = {"g8": 8, "g16": 16, "g32": 32, "g64": 64}
LENGTHS = {20: "-20", 50: "", 100: "-100"}
"""Tokens per active parameter, and the ending of the families' names."""
LEAST = 2
"""Fewest runs of which a scatter is known."""
SMALL_EFFECT = 0.02
"""Nats that finer grain is said to bring less than, if the interval excludes them."""

Rows = Sequence[Sequence[object]]


class Record:
    """The runs by family and size; searches are apart."""

    def __init__(self, results: Sequence[RunResult]) -> None:
        self.results = results

    def runs(self, family: str, size: str, seeds: int = SEEDS) -> list[RunResult]:
        """Returns runs of a family at a size with seeds from 1 to ``seeds``, in their order."""
        own = (it for it in self.results if (it.family, it.size) == (family, size) and not it.is_search)
        return sorted((it for it in own if it.seed <= seeds), key=lambda it: it.seed)

    def losses(self, family: str, size: str, seeds: int = SEEDS) -> list[float]:
        """Returns the losses of such runs that did not diverge."""
        return [it.loss for it in self.runs(family, size, seeds) if math.isfinite(it.loss)]

    def difference(self, family: str, baseline: str, size: str, seeds: int = SEEDS) -> Quantity | None:
        """Returns the difference of two families at a size; None if there are too few runs."""
        these, others = self.losses(family, size, seeds), self.losses(baseline, size, seeds)
        return welch(these, others) if min(len(these), len(others)) >= LEAST else None


def primary(record: Record, measure: Callable[[RunResult], float] | None = None) -> Quantity | None:
    """Returns the pooled difference of fine and coarse; None if a cell has too few runs.

    Args:
        record: the runs.
        measure: a run's loss; None: the registered one.
    """
    parts = []
    for size in SIZES:
        cells = [
            [(measure or _registered)(it) for it in record.runs(family, size) if it.losses]
            for family in ("fine", "coarse")
        ]
        if min(map(len, cells)) < LEAST:
            return None
        parts.append(welch(*cells))
    return pooled(parts)


def _registered(run: RunResult) -> float:
    return run.loss


def secondary(record: Record) -> dict[str, Quantity]:
    """Returns the estimate of each secondary question of which there are runs, by the plan's words."""
    found: dict[str, Quantity] = {}
    of_muon = [record.difference("muon", "adamw", size, 5) for size in SIZES]
    if all(of_muon):
        found["Muon less AdamW, pooled"] = pooled([it for it in of_muon if it])
    grains = [
        (math.log2(experts), loss)
        for name, experts in GRANULARITY.items()
        for loss in record.losses(name, "g")
    ]
    if len({place for place, _ in grains}) == len(GRANULARITY) and len(grains) > len(GRANULARITY):
        found["slope on log2 of granularity"] = line(*zip(*grains, strict=True))
    gaps = {
        math.log(length): gap
        for length, ending in LENGTHS.items()
        if (gap := record.difference(f"fine{ending}", f"coarse{ending}", "s"))
    }
    if len(gaps) == len(LENGTHS):
        found["growth of the gap per ln tokens"] = slope_through(list(gaps), list(gaps.values()))
    for name, words in (("shared", "a shared expert less none"), ("sigmoid", "sigmoid less softmax")):
        if difference := record.difference(name, "fine", "s", 10):
            found[words] = difference
    return found


def verdict(record: Record) -> str:
    """Returns the answer to the primary question, in the plan's words."""
    cells = [record.runs(family, size) for size in SIZES for family in ("coarse", "fine")]
    there, found = sum(map(len, cells)), primary(record)
    if found is None:
        return f"No answer yet: {there} of {4 * SEEDS} runs of the primary have ended."
    low, high = found.interval
    if diverged := sum(not math.isfinite(it.loss) for cell in cells for it in cell):
        p = ranks([([it.loss for it in fine], [it.loss for it in coarse]) for coarse, fine in _pairs(cells)])
        said = "Yes" if p < 0.05 and found.value < 0 else "No"
        answer = f"{said}: {diverged} runs diverged, so ranks decide, p = {p:.2g}."
    elif high < 0:
        answer = "Yes: the interval lies wholly below zero."
    else:
        less = low > -SMALL_EFFECT
        why = f"finer grain brings less than {SMALL_EFFECT} nats" if less else "these runs cannot tell"
        answer = f"No: {why}."
    if there < 4 * SEEDS:
        answer = f"Interim, not the test ({there} of {4 * SEEDS} runs). {answer}"
    return f"{answer} Fine less coarse, pooled over s and m: {_words(found)} nats per token."


def _pairs(cells: list[list[RunResult]]) -> Iterator[tuple[list[RunResult], list[RunResult]]]:
    yield from zip(cells[::2], cells[1::2], strict=True)


def _words(found: Quantity) -> str:
    low, high = found.interval
    return f"{found.value:+.4f} [{low:+.4f}, {high:+.4f}]"


def cell_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """Yields a row of each family and size: runs, losses by domain, mean, scatter, CPU time."""
    domains = sorted({domain for it in record.results for domain in it.losses})
    for family, size in dict.fromkeys((it.family, it.size) for it in record.results if not it.is_search):
        runs = [it for it in record.runs(family, size) if it.losses]
        if not runs:
            continue
        losses, last = [it.loss for it in runs], [fmean(it.last.values()) for it in runs]
        times = [it.cpu_seconds / 60 for it in runs if it.cpu_seconds]
        yield (
            family,
            size,
            str(len(runs)),
            f"{runs[0].flops:.3g}",
            f"{runs[0].multiplier:g}",
            *(f"{fmean(it.losses[domain] for it in runs):.4f}" for domain in domains),
            f"{fmean(losses):.4f}",
            *((f"{stdev(losses):.4f}", f"{stdev(last):.4f}") if len(runs) >= LEAST else ("", "")),
            f"{median(times):.1f}" if times else "",
        )


def rate_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """Yields a row of each search: mean loss of each rate tried."""
    rates = _rates(record)
    for place in dict.fromkeys((it.family, it.size) for it in record.results if it.is_search):
        own = [it for it in record.results if it.is_search and (it.family, it.size) == place]
        by_rate = {rate: [it.loss for it in own if it.multiplier == rate] for rate in rates}
        yield (*place, *(f"{fmean(by_rate[rate]):.4f}" if by_rate[rate] else "" for rate in rates))


def _rates(record: Record) -> list[float]:
    return sorted({it.multiplier for it in record.results if it.is_search})


def results_text(record: Record) -> str:
    """Returns the generated part of the page."""
    domains = sorted({domain for it in record.results for domain in it.losses})
    parts = [f"**{verdict(record)}**"]
    if len(cells := _sizes(record)) == len(SIZES):
        ratio, low, high = flop_ratio(cells)
        parts.append(f"As a FLOP ratio: {ratio:.3f}x [{low:.3f}x, {high:.3f}x] fewer at equal loss.")
    if checks := list(_check_rows(record)):
        parts.append(markdown_table(("fine less coarse", "difference", "95% interval", "p"), checks, "<>>>"))
    if found := secondary(record):
        adjusted = holm({name: it.p for name, it in found.items()})
        rows = [(name, *_cells_of(it), f"{adjusted[name]:.3g}") for name, it in found.items()]
        parts.append(
            markdown_table(("secondary", "estimate", "95% interval", "p", "p by Holm"), rows, "<>>>>")
        )
        if len(found) < 5:
            parts.append(f"{len(found)} of 5 secondary questions have runs; p by Holm is over these.")
    grains = [(math.log2(n), loss) for name, n in GRANULARITY.items() for loss in record.losses(name, "g")]
    if "slope on log2 of granularity" in found:
        parts.append(f"Quadratic term of granularity: {_words(bend(*zip(*grains, strict=True)))}.")
    heads = ("family", "size", "runs", "FLOPs", "rate", *domains, "mean", "sd", "sd of last", "CPU min")
    parts.append(markdown_table(heads, cell_rows(record), "<<" + ">" * (len(heads) - 2)))
    rates = [f"{rate:g}" for rate in _rates(record)]
    parts.append(markdown_table(("search", "size", *rates), rate_rows(record), "<<" + ">" * len(rates)))
    commits = ", ".join(sorted({it.commit[:7] for it in record.results if it.commit}))
    parts.append(f"{len(record.results)} runs, of commit {commits}; every run is in [{TABLE}]({TABLE}).")
    parts.append(f"![Fine less coarse, and loss by granularity]({PICTURE})")
    return "\n\n".join(parts)


def _sizes(record: Record) -> list[SizeRuns]:
    cells = [
        SizeRuns(
            record.runs("coarse", size)[0].flops, record.losses("fine", size), record.losses("coarse", size)
        )
        for size in SIZES
        if record.difference("fine", "coarse", size)
    ]
    return cells


def _check_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """Yields the pooled difference, and its parts and other measures, which are description only."""
    found: dict[str, Quantity | None] = {"pooled, the test": primary(record)}
    found |= {f"at {size}": record.difference("fine", "coarse", size) for size in SIZES}
    for domain in sorted({domain for it in record.results for domain in it.losses}):
        found[f"pooled, {domain} only"] = primary(record, lambda it, of=domain: it.losses[of])  # type: ignore[misc]
    found["pooled, of the last weights"] = primary(record, lambda it: fmean(it.last.values()))
    for name, estimate in found.items():
        if estimate:
            yield (name, *_cells_of(estimate))


def _cells_of(found: Quantity) -> tuple[str, str, str]:
    low, high = found.interval
    return f"{found.value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{found.p:.3g}"


def write_page(record: Record, docs: Path) -> str:
    """Writes the figure, and the results into the page; returns them."""
    text, page = results_text(record), docs / PAGE
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise UserError(f"has no lines {BEGIN!r} and {END!r} for the results", file=str(page))
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    _draw(record, docs / PICTURE)
    return text


def _draw(record: Record, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from train.record.page.svg import COLOURS, STYLE

    gaps: Mapping[str, Quantity | None] = {
        **{
            f"s, {n} tokens a parameter": record.difference(f"fine{e}", f"coarse{e}", "s")
            for n, e in LENGTHS.items()
        },
        "m, 50": record.difference("fine", "coarse", "m"),
        "pooled s and m, 50": primary(record),
    }
    with matplotlib.rc_context({**STYLE, "text.color": "black", "axes.labelcolor": "black"}):
        picture = Figure(figsize=(9.0, 3.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(picture)
        left, right = picture.subplots(1, 2)
        shown = {name: gap for name, gap in gaps.items() if gap}
        for place, gap in enumerate(shown.values()):
            half = gap.interval[1] - gap.value
            left.errorbar(gap.value, -place, xerr=half, fmt="o", color=COLOURS[0], capsize=3)
        left.axvline(0, color="gray", lw=0.8)
        left.set_yticks([-place for place in range(len(shown))], list(shown))
        left.set_xlabel("fine less coarse, nats per token, 95% interval")
        for name, experts in GRANULARITY.items():
            losses = record.losses(name, "g")
            right.plot([experts] * len(losses), losses, "o", color=COLOURS[1], ms=4)
        right.set_xscale("log", base=2)
        right.set_xlabel("experts at equal FLOPs")
        right.set_ylabel("held-out loss, nats per token")
        picture.savefig(file, dpi=110)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--record", type=Path, default=RECORD, help="CSV file of the runs (default %(default)s)"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of page, figure and copy of the record"
    )


@command(
    "python -m launch.experiments.efficiency", __doc__, add_arguments, json="write the figures", file="record"
)
def main(options: Namespace) -> Figures:
    """Copies the record, and writes page and figure."""
    record = Record(read_results_file(options.record))
    if not record.results:
        remedy = "train some first: python -m launch.experiments.ladder yamls/ladder-efficiency.yaml"
        raise UserError("has no runs", remedy=remedy)
    if options.record.resolve() != (options.docs / TABLE).resolve():
        shutil.copyfile(options.record, options.docs / TABLE)
    print(write_page(record, options.docs))
    found = {"primary": primary(record), **secondary(record)}
    tree = {name: {**vars(it), "interval": it.interval, "p": it.p} for name, it in found.items() if it}
    return Figures({"answer": verdict(record), "estimates": tree})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
