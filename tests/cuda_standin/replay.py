"""The time of a step that was recorded on the stand-in: what ran at the same time, and what nothing hid.

The order of calls, their streams, events and the host's waits are as recorded. Durations are a model:
products, attention and passes over memory at the rates that were measured on an H100 (docs/gpu.md),
collectives at the planner's time of a ring. So a difference between two orders of the same calls means
something; a time in milliseconds is only as good as the model.
"""

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from launch.plan.hardware import GPUS, Gpu
from launch.plan.traffic import Collective, CollectiveKind
from train.recipe.schema import Parallelism
from train.recipe.sizes import shard_degree

PRODUCTS = {"bf16": 700e12, "fp32": 45e12, "tf32": 350e12}
"""FLOP/s by precision. Of bf16 793 TFLOP/s were measured in a large product, 630 to 770 in grouped ones."""
ATTENTION = 2 * 440e12
"""Likewise, of attention over all positions, of which a causal mask leaves half: SDPA with heads repeated."""
MEMORY = 2.92e12
"""Bytes per second, read and written: measured on copies."""
LAUNCH_SECONDS = 2.5e-6
"""The shortest kernel."""
HOST_SECONDS = 25e-6
"""The host's time to launch one: assumed; 75 on this project's two shared cores."""
PRODUCT_SECONDS = 3e-6
"""The start and the end of a product, in which the device is not full: assumed."""
IN_PLACE = (".out", "copy_", "fsdp.", "_foreach_norm")
"""Operations whose outputs are among their arguments, or are small."""
ROWS_BY_INDEX = ("embedding", "index_select", "gather")
"""Operations that read only some rows of an argument."""
FUSED_ADAMW_SHARE = 1.75
"""Reads weights, gradients and two moments, and writes all but the gradients."""
Span = tuple[float, float]


class Call(NamedTuple):
    """A line of the timeline."""

    group: str
    name: str
    amount: float
    stream: str
    event: str


@dataclass
class Replay:
    """A step in seconds."""

    seconds: float = 0.0
    computing: list[Span] = field(default_factory=list)
    sending: list[Span] = field(default_factory=list)
    by_operation: collections.Counter[str] = field(default_factory=collections.Counter)
    by_collective: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def links(self) -> float:
        """Seconds in which a collective runs."""
        return _length(self.sending)

    @property
    def open(self) -> float:
        """Seconds of :attr:`links` in which nothing is computed."""
        return _length([*self.computing, *self.sending]) - _length(self.computing)


def read(path: str) -> list[Call]:
    """Reads a timeline."""
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [Call(group, name, float(amount), stream, event) for group, name, amount, stream, event in rows]


def replay(calls: list[Call], layout: Parallelism, world_size: int, gpu: Gpu = GPUS["h100"]) -> Replay:
    """Runs the recorded calls of one rank on a model of a GPU and of its links.

    Args:
        calls: the timeline.
        layout: the degrees of the mesh, by which a group's ranks are neighbours or not.
        world_size: ranks.
        gpu: whose links to take.
    """
    found = Replay()
    host = 0.0
    free: dict[str, float] = collections.defaultdict(float)
    """By stream: when it has done what it was asked."""
    recorded: dict[str, float] = {}
    """By event: when its stream reaches it."""

    def run(spans: list[Span], stream: str, seconds: float) -> None:
        start = max(host, free[stream])
        free[stream] = start + seconds
        spans.append((start, free[stream]))

    for call, operation, seconds in _with_seconds(calls):
        if call.group == "waits":
            # A stream's name is empty where the host waits for all.
            until = recorded.get(call.event, 0.0) if call.name == "event" else free[call.stream]
            host = max(host, max(free.values()) if call.name == "device" else until)
        elif call.group == "events":
            if call.name == "record":
                recorded[call.event] = free[call.stream]
            elif call.name == "a stream waits":
                free[call.stream] = max(free[call.stream], recorded.get(call.event, 0.0))
        elif call.group == "collectives":
            host += HOST_SECONDS
            taken = _collective_seconds(call, layout, world_size, gpu)
            found.by_collective[call.name] += taken
            run(found.sending, call.stream, taken)
        else:
            host += HOST_SECONDS
            found.by_operation[operation] += seconds
            run(found.computing, call.stream, seconds)
    found.seconds = max(host, *free.values())
    return found


def _with_seconds(calls: list[Call]) -> Iterable[tuple[Call, str, float]]:
    """Yields the calls to the device with the operation that makes them and their duration.

    The first kernel of an operation takes as long as its bytes or FLOPs; the others as long as a launch. The
    messages of an exchange are one collective.
    """
    operations = _operations(calls)
    inside: list[int] = []
    begun: set[int] = set()
    messages: list[Call] = []
    for place, call in enumerate(calls):
        if call.group == "collectives" and call.name.startswith(("send", "receive")):
            messages += [call] if call.name.startswith("send") else []
            continue
        if messages:
            group = messages[0].name.removeprefix("send")
            sent = sum(message.amount for message in messages)
            yield messages[0]._replace(name=f"all-to-all{group}", amount=sent), "", 0.0
            messages = []
        if call.group == "begin":
            inside.append(place)
        elif call.group == "end":
            inside.pop()
        elif call.group == "products":
            rate = PRODUCTS[call.name.partition(" ")[0]]
            yield call, "products", PRODUCT_SECONDS + call.amount / rate
        elif call.group in ("kernels", "triton", "copies"):
            seconds, name = LAUNCH_SECONDS, call.group
            if inside:
                name = calls[inside[-1]].name
                if inside[-1] not in begun:
                    begun.add(inside[-1])
                    seconds = max(seconds, operations[inside[-1]])
            elif call.group == "copies":
                seconds += 2 * call.amount / MEMORY
            yield call, name, seconds
        elif call.group in ("collectives", "events", "waits") and call.name != "query":
            yield call, "", 0.0


def _operations(calls: list[Call]) -> dict[int, float]:
    """Returns the seconds of each operation, by the place of its beginning."""
    found, inside = {}, []
    figures: dict[str, float] = {}
    for place, call in enumerate(calls):
        if call.group == "begin":
            inside.append(place)
        elif call.group in ("flops", "read", "written"):
            figures[call.group] = call.amount
        elif call.group == "end":
            found[inside.pop()] = _seconds(call.name, **figures)
            figures = {}
    return found


def _seconds(name: str, read: float = 0.0, written: float = 0.0, flops: float = 0.0) -> float:
    if flops:
        return flops / (ATTENTION if "attention" in name else PRODUCTS["bf16"])
    if "fused_adamw" in name:
        return FUSED_ADAMW_SHARE * read / MEMORY
    if any(part in name for part in ROWS_BY_INDEX):
        return min(read + written, 3 * written) / MEMORY
    return (read + (0.0 if any(part in name for part in IN_PLACE) else written)) / MEMORY


def _collective_seconds(call: Call, layout: Parallelism, world_size: int, gpu: Gpu) -> float:
    what, _, ranks = call.name.rpartition(" over ")
    kinds = [kind for kind in CollectiveKind if kind.value == what]
    if not kinds:
        return 0.0
    # Experts exchange tokens, once per node in two steps, of which two of one size are taken for the inner
    # one; of two dimensions of one size the other is meant by all else.
    shard = shard_degree(layout, world_size)
    local = layout.exchange_node_ranks or layout.expert
    strides = (
        {layout.sharing: 1, layout.expert: 1, layout.expert // local: local, local: 1}
        if kinds[0] is CollectiveKind.all_to_all
        else {
            layout.sharing: 1,
            shard * layout.expert // layout.tensor: layout.tensor,
            world_size: 1,
            layout.replicate: world_size // layout.replicate,
            shard * layout.expert: 1,
            shard: layout.expert,
        }
    )
    return Collective(what, kinds[0], call.amount, int(ranks), strides[int(ranks)], 1).seconds(gpu)


def _length(spans: Iterable[Span]) -> float:
    """The length of the union of spans."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
