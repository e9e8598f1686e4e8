"""The figures of a run's page, each as inline SVG."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from train.record import metrics
from train.record.page.svg import COLOURS, INK, STYLE, WIDTH_INCHES, Mark, draw_svg, log_scale
from train.report.run_record import RunRecord, Series

# Shapes: N recorded steps, L layers, E experts.

POINTS = 800
HEAT_MAP_LAYERS = 12
LOAD_OCTAVES = 2
"""The heat map's colours range from a quarter to four times the balanced load."""


def loss_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws training and validation loss over tokens, with the unigram entropy as the baseline."""

    def draw(axes: Sequence[Any]) -> None:
        (axis,) = axes
        training = thinned(run.series(metrics.LOSS))
        axis.plot(
            millions(training),
            training.values,
            color=COLOURS[0],
            alpha=0.25,
            linewidth=0.8,
            label="_training",
        )
        axis.plot(millions(training), smoothed(training.values), color=COLOURS[0], label="training, smoothed")
        for colour, (domain, key) in zip(
            cycle(COLOURS[1:]), metrics.match_names(metrics.LOSS_VALIDATION, run.keys).items(), strict=False
        ):
            losses = run.series(key)
            axis.plot(
                millions(losses),
                losses.values,
                "o-",
                markersize=4,
                color=colour,
                label=f"validation, {domain}",
            )
            if run.summary and domain in run.summary.unigram_entropy:
                entropy = run.summary.unigram_entropy[domain]
                axis.axhline(entropy, color=colour, linestyle=":", linewidth=1.2)
                axis.annotate(
                    f"unigram entropy, {domain}: {entropy:.2f}",
                    (1, entropy),
                    xycoords=("axes fraction", "data"),
                    xytext=(-4, 3),
                    textcoords="offset points",
                    ha="right",
                    color=colour,
                )
        axis.set_ylabel("nats per token")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)

    return draw_svg("Loss over tokens", draw, heights=(3.8,), marks=marks)


def throughput_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws tokens per second and utilisation of the measured peak over tokens."""

    def draw(axes: Sequence[Any]) -> None:
        for axis, key, label, scale, colour in (
            (axes[0], metrics.TOKENS_PER_SECOND, "tokens/s", 1.0, COLOURS[0]),
            (axes[1], metrics.FLOP_UTILISATION, "% of peak FLOP/s", 100.0, COLOURS[2]),
        ):
            series = thinned(run.series(key))
            values = series.values * scale
            axis.plot(millions(series), values, color=colour, alpha=0.35, linewidth=0.8)
            axis.plot(millions(series), smoothed(values), color=colour, label="_smoothed")
            axis.set_ylabel(label)
            axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter("{x:,.0f}" if np.nanmax(values) > 5 else "{x:g}")

    return draw_svg("Throughput and FLOP utilisation over tokens", draw, heights=(2.0, 2.0), marks=marks)


def optimisation_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws learning rate and gradient norm over tokens."""

    def draw(axes: Sequence[Any]) -> None:
        rate = thinned(run.series(metrics.LEARNING_RATE))
        axes[0].plot(millions(rate), rate.values, color=COLOURS[3])
        axes[0].set_ylabel("learning rate")
        axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        axes[0].set_ylim(0, None)
        norm = thinned(run.series(metrics.GRADIENT_NORM))
        axes[1].plot(millions(norm), norm.values, color=COLOURS[1], alpha=0.35, linewidth=0.8)
        axes[1].set_ylabel("gradient norm")
        if np.nanmin(norm.values, initial=np.inf) > 0:
            # Geometric means: a single spike would raise an arithmetic mean over its whole window.
            smooth = np.exp(smoothed(np.log(norm.values)))
            axes[1].plot(millions(norm), smooth, color=COLOURS[1], label="_smoothed")
            log_scale(axes[1])

    return draw_svg("Learning rate and gradient norm over tokens", draw, heights=(1.8, 2.0), marks=marks)


def memory_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws memory of GPU, process and node over tokens, the largest of every few steps."""
    gpu = (
        (metrics.GPU_MEMORY_PEAK, "GPU, peak of the step", COLOURS[0]),
        (metrics.GPU_MEMORY_RESERVED, "GPU, held by the allocator", COLOURS[1]),
    )
    host = (
        (metrics.PROCESS_MEMORY, "process", COLOURS[2]),
        (metrics.HOST_MEMORY, "node", COLOURS[3]),
    )
    groups = [group for group in (gpu, host) if any(run.series(key) for key, _, _ in group)]

    def draw(axes: Sequence[Any]) -> None:
        for axis, group in zip(axes, groups, strict=True):
            for key, label, colour in group:
                series = peaks(run.series(key))
                axis.plot(millions(series), series.values / 1e9, color=colour, label=label)
            axis.set_ylabel("GB")
            axis.set_ylim(0, None)
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return draw_svg("Memory over tokens", draw, heights=(1.8,) * len(groups), marks=marks)


def sensors_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws power and temperature of the GPU over tokens."""

    def draw(axes: Sequence[Any]) -> None:
        for axis, key, label, colour in (
            (axes[0], metrics.GPU_POWER, "W", COLOURS[1]),
            (axes[1], metrics.GPU_TEMPERATURE, "°C", COLOURS[4]),
        ):
            series = thinned(run.series(key))
            axis.plot(millions(series), series.values, color=colour)
            axis.set_ylabel(label)
            axis.set_ylim(0, None)

    return draw_svg("Power and temperature of the GPU over tokens", draw, heights=(1.6, 1.6), marks=marks)


def layers_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws heat maps of each layer's gradient norm, relative update and activations over tokens."""
    layers = range(run.layers_measured)

    def grid(key: str) -> np.ndarray:
        return np.stack([thinned(run.series(metrics.of_layer(key, layer))).values for layer in layers])

    panels = [
        ("gradient norm", grid(metrics.LAYER_GRADIENT)),
        ("update / weights", grid(metrics.LAYER_UPDATE) / grid(metrics.LAYER_WEIGHTS)),
    ]
    if run.series(metrics.of_layer(metrics.LAYER_ACTIVATION, 0)):
        panels.append(("activation, RMS", grid(metrics.LAYER_ACTIVATION)))
    ends = span(thinned(run.series(metrics.of_layer(metrics.LAYER_GRADIENT, 0))))

    def draw(axes: Sequence[Any]) -> None:
        from matplotlib.colors import LogNorm

        for axis, (label, values_LN) in zip(axes, panels, strict=True):
            positive = values_LN[np.isfinite(values_LN) & (values_LN > 0)]
            low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
            image = axis.imshow(
                values_LN,
                aspect="auto",
                cmap="viridis",
                norm=LogNorm(low, max(high, low * 1.01)),
                interpolation="nearest",
                extent=(*ends, len(layers) - 0.5, -0.5),
            )
            axis.set_ylabel("layer")
            axis.set_yticks(range(0, len(layers), max(1, len(layers) // 10)))
            axis.grid(visible=False)
            bar = axis.figure.colorbar(image, ax=axis, pad=0.01, label=label)
            log_scale(bar.ax)
            bar.outline.set_visible(False)

    height = max(1.4, min(4, 0.25 * len(layers)))
    return draw_svg("Norms over layers and tokens", draw, heights=(height,) * len(panels), marks=marks)


def router_figure(run: RunRecord, marks: Sequence[Mark]) -> Markup:
    """Draws router losses and the load of each layer's busiest and idlest expert over tokens."""
    experts = run.load_shares.shape[2]

    def draw(axes: Sequence[Any]) -> None:
        for key, label, colour in (
            (metrics.LOSS_BALANCE, "balance loss", COLOURS[0]),
            (metrics.LOSS_Z, "z-loss", COLOURS[3]),
        ):
            series = thinned(run.series(key))
            if len(series) and np.nanmax(series.values) > 0:
                axes[0].plot(millions(series), smoothed(series.values), color=colour, label=label)
        if axes[0].lines:
            log_scale(axes[0])
            axes[0].legend()
        axes[0].set_ylabel("router losses")
        layers = range(run.load_shares.shape[1])
        for key, label, colour in (
            (metrics.EXPERT_BUSIEST, "busiest expert", COLOURS[4]),
            (metrics.EXPERT_IDLEST, "idlest expert", COLOURS[0]),
        ):
            for layer in layers:
                series = thinned(run.series(metrics.of_layer(key, layer)))
                shown = f"{'_' if layer else ''}{label}"
                axes[1].plot(
                    millions(series),
                    smoothed(series.values * experts),
                    color=colour,
                    alpha=0.4 + 0.6 * (layer + 1) / len(layers),
                    linewidth=1.0,
                    label=shown,
                )
        axes[1].axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes[1].set_ylabel("load / balanced load")
        axes[1].set_ylim(0, None)
        axes[1].legend(ncols=2)

    return draw_svg("Router losses and extreme loads over tokens", draw, heights=(1.8, 2.2), marks=marks)


def entropy_figure(run: RunRecord) -> Markup:
    """Draws the evenness of each layer's load over tokens: a row per layer."""
    layers = run.load_shares.shape[1]
    rows = [thinned(run.series(metrics.of_layer(metrics.EXPERT_ENTROPY, layer))) for layer in range(layers)]

    def draw(axes: Sequence[Any]) -> None:
        (axis,) = axes
        grid_LN = np.stack([row.values for row in rows])
        low = min(0.9, float(np.nanmin(grid_LN)))
        image = axis.imshow(
            grid_LN,
            aspect="auto",
            cmap="viridis",
            vmin=low,
            vmax=1,
            interpolation="nearest",
            extent=(*span(rows[0]), layers - 0.5, -0.5),
        )
        axis.set_ylabel("layer")
        axis.set_yticks(range(0, layers, max(1, layers // 10)))
        axis.grid(visible=False)
        bar = axis.figure.colorbar(image, ax=axis, pad=0.01, label="entropy (1: balanced)")
        bar.outline.set_visible(False)

    return draw_svg(
        "Evenness of expert load over layers and tokens", draw, heights=(max(1.6, min(5, 0.28 * layers)),)
    )


def load_figure(run: RunRecord) -> Markup:
    """Draws a heat map of every expert's load over tokens, a panel per layer (at most 12, evenly spaced)."""
    draw, rows, columns = _load_drawing(run)
    return draw_svg("Expert load over layers and tokens", draw, heights=(1.9,) * rows, columns=columns)


def write_load_picture(run: RunRecord, path: Path) -> None:
    """Writes the same as a picture on white; nothing, if Matplotlib is left out of the installation."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draw, rows, columns = _load_drawing(run)
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(WIDTH_INCHES, 1.9 * rows + 0.35), layout="constrained")
        FigureCanvasAgg(picture)
        draw(list(picture.subplots(rows, columns, sharex=True, squeeze=False).ravel()))
        picture.savefig(path, dpi=110)


def _load_drawing(run: RunRecord) -> tuple[Callable[[Sequence[Any]], None], int, int]:
    """Returns what draws the heat map of the experts' load, and the numbers of its rows and columns."""
    _, layers, experts = run.load_shares.shape
    shown = np.unique(np.linspace(0, layers - 1, min(layers, HEAT_MAP_LAYERS)).round().astype(int))
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    tokens = Series(run.load_tokens, run.load_tokens)
    # Octaves above and below the balanced load; an expert without tokens has the lowest value.
    octaves_NLE = np.log2(np.maximum(run.load_shares * experts, 2.0**-LOAD_OCTAVES))

    def draw(axes: Sequence[Any]) -> None:
        image = None
        for place, axis in enumerate(axes):
            if place >= len(shown):
                axis.axis("off")
                continue
            image = axis.imshow(
                octaves_NLE[:, shown[place]].T,
                aspect="auto",
                cmap="RdBu_r",
                vmin=-LOAD_OCTAVES,
                vmax=LOAD_OCTAVES,
                interpolation="nearest",
                extent=(*span(tokens), experts - 0.5, -0.5),
            )
            axis.set_title(f"layer {shown[place]}", fontsize=9.5)
            axis.grid(visible=False)
            axis.set_yticks([0, experts - 1])
            if place % columns == 0:
                axis.set_ylabel("expert")
            if place >= len(shown) - columns:
                axis.set_xlabel("million tokens")
        octaves = range(-LOAD_OCTAVES, LOAD_OCTAVES + 1)
        bar = axes[0].figure.colorbar(
            image, ax=list(axes), pad=0.012, ticks=list(octaves), label="load / balanced load"
        )
        bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
        bar.outline.set_visible(False)

    return draw, rows, columns


def millions(series: Series) -> np.ndarray:
    """Returns tokens in millions, for the axis."""
    return series.tokens / 1e6


def span(series: Series) -> tuple[float, float]:
    """Returns the first and last column of a heat map, in millions of tokens."""
    ends = millions(series)
    return float(ends[0]), float(ends[-1]) if ends[-1] > ends[0] else float(ends[0]) + 1e-6


def thinned(series: Series, points: int = POINTS) -> Series:
    """Reduces a series to at most ``points`` points, each the mean of a segment."""
    if len(series) <= points:
        return series
    parts = np.array_split(np.arange(len(series)), points)
    means = np.array([finite_mean(series.values[part]) for part in parts])
    return Series(np.array([series.tokens[part].mean() for part in parts]), means)


def peaks(series: Series, points: int = POINTS) -> Series:
    """Reduces a series to at most ``points`` points, each the largest of a segment."""
    if len(series) <= points:
        return series
    parts = np.array_split(np.arange(len(series)), points)
    largest = np.array([np.nan_to_num(series.values[part], nan=0.0).max() for part in parts])
    return Series(np.array([series.tokens[part].mean() for part in parts]), largest)


def finite_mean(values: np.ndarray) -> float:
    """Returns the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def smoothed(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Returns the moving average over about a thirtieth of the run, with a shorter window at the ends."""
    half = int(share * len(values) / 2)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    # Near an end the window shrinks on both sides, so that a slope there stays unbiased.
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    first, last = at - reach, at + reach + 1
    known = counts[last] - counts[first]
    return np.where(known > 0, (sums[last] - sums[first]) / np.maximum(known, 1), np.nan)
