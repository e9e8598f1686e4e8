"""Overlap of a step's traffic with its arithmetic, in the order in which :mod:`train.layout.mesh` sends.

Weights are gathered one layer ahead and gradients reduced one layer behind, so both run under the arithmetic
of other layers; tokens on their way between experts are waited for, all or, where halves of a microbatch are
interleaved, a quarter: the last way back of each pass. So is what ranks send each other that share sequences:
keys and values, or the tokens and sums of dense weights that they share. In the steady state a layer takes
the longer of its own time, arithmetic and exchange, and of the time that its collectives keep a kind of link
busy. Nothing hides the first layer's gather, the last layer's reduction and what is outside the layers.

This is the closed form of a replay of recorded calls (tests/cuda_standin/replay.py), which it is compared
with. Neither knows that collectives take SMs and memory bandwidth from arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launch.plan.hardware import Gpu
from launch.plan.step_time import Seconds
from launch.plan.traffic import (
    GATHERED,
    HEADS,
    KEYS,
    KEYS_BACK,
    SHARES,
    SUMMED,
    Collective,
    CollectiveKind,
)

OPEN = (KEYS, KEYS_BACK, SHARES, GATHERED, SUMMED, HEADS)
"""Traffic that attention and dense products wait for: it has nothing to hide behind."""
OPEN_IF_INTERLEAVED = 0.25
"""Share of the exchange that has nothing to hide behind, see :mod:`train.model.interleave`."""


@dataclass(frozen=True)
class Overlapped:
    """Arithmetic and traffic that run at the same time."""

    seconds: Seconds
    """Of links only the open part, which nothing hides."""
    hidden: float = 0.0
    """Seconds of traffic that run under arithmetic."""

    def __add__(self, other: "Overlapped") -> "Overlapped":
        return Overlapped(self.seconds + other.seconds, self.hidden + other.hidden)

    def times(self, count: float) -> "Overlapped":
        """The same, repeated ``count`` times."""
        return Overlapped(self.seconds.times(count), count * self.hidden)


@dataclass(frozen=True)
class Traffic:
    """Seconds of a pass's collectives."""

    waited_for: float = 0.0
    """The exchange of tokens, but for what is interleaved, and what ranks that share sequences exchange."""
    behind: float = 0.0
    """Gathers, reductions, and what is interleaved."""
    edge: float = 0.0
    """Seconds that no layer's arithmetic hides."""
    busiest: float = 0.0
    """Seconds for which all of it but the edge keeps the busier kind of link busy: NVLink, or the network."""


def overlap(arithmetic: Seconds, traffic: Traffic) -> Overlapped:
    """Returns the time of layers with this arithmetic and this traffic, all layers together."""
    links = max(traffic.waited_for, traffic.busiest - arithmetic.total)
    hidden = traffic.waited_for + traffic.behind - links
    return Overlapped(replace(arithmetic, links=links + traffic.edge), hidden)


def traffic_of(
    collectives: Iterable[tuple[Collective, int]],
    layers: int,
    gpu: Gpu,
    links_share: float,
    open_exchange: float = 1.0,
) -> Traffic:
    """Sums a pass's collectives.

    Args:
        collectives: each with its number of calls in the pass.
        layers: L; of collectives with so many calls or more, one call is at the edge.
        gpu: whose links carry them.
        links_share: share of the links' full rate.
        open_exchange: share of the exchange of tokens that nothing hides.
    """
    waited_for = behind = edge = 0.0
    busy = {True: 0.0, False: 0.0}
    for collective, calls in collectives:
        one = collective.seconds(gpu) / links_share
        if collective.what in OPEN:
            waited_for += calls * one
            inside = calls
        elif collective.kind is CollectiveKind.all_to_all:
            waited_for += open_exchange * calls * one
            behind += (1 - open_exchange) * calls * one
            inside = calls
        else:
            at_edge = 1 if calls >= layers else calls if collective.is_outside_layers else 0
            edge += at_edge * one
            inside = calls - at_edge
            behind += inside * one
        busy[collective.members_per_node(gpu.gpus_per_node) == collective.ranks] += inside * one
    return Traffic(waited_for, behind, edge, max(busy.values()))
