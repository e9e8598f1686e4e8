"""Speed of the links between ranks, and detection of slow ranks and pairs.

Pairs are measured as in a round-robin tournament, all ranks at once: in each round every rank exchanges a
message with one partner, there and back, a few times. The tournament is repeated, so that a link's
measurements are spread over time. A link's time is the median over tournaments of the fastest exchange in
each: noise only adds time, and a burst affects one tournament of several. A rank's time is the median over
its links, so a slow partner does not make it look slow. Links within a node and between nodes are compared
separately. A rank or pair is slow if it takes several times as long as the median of the others; suspects are
measured again, and only those found slow every time are reported.

On GPUs all of it goes over one group that ends with the measurement (:func:`measuring_group`): a communicator
keeps memory and connections to every peer that it has met, and training never meets most of them.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE_BYTES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Large enough on a GPU that a port at a quarter of its bandwidth stands out: 3 ms there and back at
400 Gbit/s (not yet run on a GPU)."""
COLLECTIVE_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
"""Large enough that bandwidth, not latency, dominates with thousands of ranks (not yet run on a GPU)."""
MOST_ROUNDS = 16
"""Maximum number of partners per rank; up to 17 ranks, all of them."""
TOURNAMENTS = 5
EXCHANGES = 3
"""Exchanges per pair and tournament."""
CONFIRMATIONS = 2
"""Further measurements in which a suspect must be found slow."""
COLLECTIVES = ALL_REDUCE, ALL_GATHER, ALL_TO_ALL = ("all-reduce", "all-gather", "all-to-all")
REPEATS = 7
"""Repetitions of each collective."""
LEAST_SECONDS = {"cpu": 0.01, "cuda": 0.0005}
"""Smaller differences are ignored: scheduling alone causes as much if ranks share cores (the GPU's value not
yet run on a GPU)."""


@dataclass(frozen=True)
class Links:
    """Measured links and the slow ranks and pairs."""

    seconds: dict[tuple[int, int], float]
    """Round-trip time by pair; links within nodes are scaled by :func:`by_kind`."""
    slow_ranks: list[int]
    slow_pairs: list[tuple[int, int]]
    """Slow pairs of ranks that are not themselves slow."""
    usual_inside: float | None
    """Median link within a node; None if there is none."""
    usual_between: float | None
    """Median link between nodes; None on one node."""

    @property
    def usual(self) -> float:
        """Median link between ranks that are not slow."""
        normal = [took for pair, took in self.seconds.items() if not set(pair) & set(self.slow_ranks)]
        return statistics.median(normal or self.seconds.values())


@contextmanager
def measuring_group(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """Makes a group of all ranks for measurements, and destroys it with its connections; every rank calls it.

    None stands for the job's own group, on gloo: it is connected already, and destroying a gloo group may
    deadlock on torch 2.7.
    """
    if dist.get_backend() == dist.Backend.GLOO:
        yield None
        return
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    # NCCL connects a group in its first collective, in which all its ranks must take part.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def measure_links(
    device: torch.device,
    factor: float,
    nodes: Sequence[str] = (),
    group: dist.ProcessGroup | None = None,
) -> Links:
    """Measures pairs of ranks; every rank calls it and gets the same result.

    Args:
        device: device of the messages.
        factor: ratio to the median of the others above which a rank or pair is slow.
        nodes: name of each rank's node; empty: all on one node.
        group: all ranks, see :func:`measuring_group`; None: the job's own group.
    """
    found = _measure_once(device, factor, nodes, group)
    for _ in range(CONFIRMATIONS):
        if not found.slow_ranks and not found.slow_pairs:
            break
        again = _measure_once(device, factor, nodes, group)
        found = replace(
            again,
            slow_ranks=[rank for rank in again.slow_ranks if rank in found.slow_ranks],
            slow_pairs=[pair for pair in again.slow_pairs if pair in found.slow_pairs],
        )
    return found


def _measure_once(
    device: torch.device, factor: float, nodes: Sequence[str], group: dist.ProcessGroup | None
) -> Links:
    rank, world = dist.get_rank(), dist.get_world_size()
    size = MESSAGE_BYTES[device.type]
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    mine: dict[tuple[int, int], list[float]] = {}
    for _ in range(TOURNAMENTS):
        for pairs in rounds(world):
            partner = pairs.get(rank)
            if partner is not None:
                times = [_exchange(message, rank, partner, group) for _ in range(EXCHANGES)]
                if rank < partner:
                    mine.setdefault((rank, partner), []).append(min(times))
            dist.barrier(group)
    everybody: list[dict[tuple[int, int], list[float]]] = [{} for _ in range(world)]
    dist.all_gather_object(everybody, mine)
    seconds = {pair: statistics.median(times) for part in everybody for pair, times in part.items()}
    inside = {pair: took for pair, took in seconds.items() if not nodes or nodes[pair[0]] == nodes[pair[1]]}
    between = {pair: took for pair, took in seconds.items() if pair not in inside}
    comparable = by_kind(inside, between)
    return Links(
        comparable,
        *find_slow(comparable, factor, LEAST_SECONDS[device.type]),
        statistics.median(inside.values()) if inside else None,
        statistics.median(between.values()) if between else None,
    )


def by_kind(
    inside: dict[tuple[int, int], float], between: dict[tuple[int, int], float]
) -> dict[tuple[int, int], float]:
    """Merges the times of all links, scaling those within nodes to be comparable with those between nodes.

    Args:
        inside: seconds by pair of ranks on the same node.
        between: seconds by pair of ranks on different nodes.
    """
    if not inside or not between:
        return inside | between
    # The low median: if half of the links of a kind are slow, the other half is normal.
    scale = statistics.median_low(between.values()) / statistics.median_low(inside.values())
    return {pair: took * scale for pair, took in inside.items()} | between


def find_slow(
    seconds: dict[tuple[int, int], float], factor: float, least: float = 0.0
) -> tuple[list[int], list[tuple[int, int]]]:
    """Finds slow ranks, and slow pairs of other ranks.

    Args:
        seconds: seconds by pair.
        factor: ratio to the median of the others above which a rank or pair is slow.
        least: seconds above that median that are tolerated.
    """
    links: dict[int, list[float]] = {}
    for pair, took in seconds.items():
        for rank in pair:
            links.setdefault(rank, []).append(took)
    of_rank = {rank: statistics.median_low(links[rank]) for rank in sorted(links)}
    fastest = min(seconds.values(), default=0.0)
    slow_ranks = []
    for rank, median in of_rank.items():
        # No median is below the fastest link, so of thousands of ranks only a few need a closer look.
        if median <= max(factor * fastest, fastest + least):
            continue
        others = [took for pair, took in seconds.items() if rank not in pair]
        # With two ranks there is nothing to compare with.
        if others and median > max(factor * (usual := statistics.median(others)), usual + least):
            slow_ranks.append(rank)
    rest = {pair: took for pair, took in seconds.items() if not set(pair) & set(slow_ranks)}
    usual = statistics.median(rest.values()) if rest else 0.0
    bound = max(factor * usual, usual + least)
    slow_pairs = [pair for pair, took in rest.items() if len(rest) > 2 and took > bound]
    return slow_ranks, slow_pairs


def rounds(world: int, most: int = MOST_ROUNDS) -> Iterator[dict[int, int]]:
    """Yields partners by rank for each round of a round-robin tournament, by the circle method."""
    places = world + world % 2
    count = places - 1
    for number in range(min(count, most)):
        turn = number * count // min(count, most)
        ring = [0, *(1 + (place + turn) % count for place in range(count))]
        pairs = {}
        for place in range(places // 2):
            one, other = ring[place], ring[places - 1 - place]
            if one < world and other < world:
                pairs[one], pairs[other] = other, one
        yield pairs


def measure_collectives(
    device: torch.device, expert: int, group: dist.ProcessGroup | None = None, repeats: int = REPEATS
) -> dict[str, float]:
    """Measures the bus bandwidth of collectives in Gbit/s, by name; all ranks get the same result.

    All-reduce and all-gather are over all ranks; all-to-all is over the expert groups, all at once, and is
    left out if each group has one rank. Bus bandwidth as NVIDIA's nccl-tests define it: the bytes that
    each rank sends, 2 (n-1)/n of the size for all-reduce and (n-1)/n for the others, over the time.

    Args:
        device: device of the tensors.
        expert: number of ranks that share out the experts, numbered one after the other.
        group: all ranks, see :func:`measuring_group`; None: the job's own group.
        repeats: repetitions of each.
    """
    world = dist.get_world_size()
    parts = world * expert
    count = COLLECTIVE_BYTES[device.type] // 4 // parts * parts
    whole, out = torch.zeros(count, device=device), torch.empty(count, device=device)
    part = torch.zeros(count // world, device=device)
    works: dict[str, tuple[Callable[[], object], float]] = {
        ALL_REDUCE: (lambda: dist.all_reduce(whole, group=group), 2 * (world - 1) / world),
        ALL_GATHER: (lambda: dist.all_gather_into_tensor(out, part, group), (world - 1) / world),
    }
    if expert > 1:
        works[ALL_TO_ALL] = (lambda: _all_to_all(out, whole, expert, group), (expert - 1) / expert)
    found = {}
    for name, (work, share) in works.items():
        times = []
        for _ in range(repeats):
            dist.barrier(group)
            begun = time.perf_counter()
            work()
            _settle(whole)
            times.append(time.perf_counter() - begun)
        slowest = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        found[name] = 8e-9 * 4 * count * share / slowest.item()
    return found


def send(message: Tensor, partner: int, group: dist.ProcessGroup | None) -> None:
    """Sends a message over the group's own communicator; ``dist.send`` would make one for each pair."""
    _batch([dist.P2POp(dist.isend, message, partner, group)])


def receive(message: Tensor, partner: int, group: dist.ProcessGroup | None) -> None:
    """Receives a message that was sent by :func:`send`."""
    _batch([dist.P2POp(dist.irecv, message, partner, group)])


def _batch(messages: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(messages):
        work.wait()


def _all_to_all(out: Tensor, whole: Tensor, expert: int, group: dist.ProcessGroup | None) -> None:
    """An all-to-all in each expert group, as NCCL's is: messages between its ranks, all at once."""
    rank = dist.get_rank()
    first, parts, into = rank // expert * expert, whole.chunk(expert), out.chunk(expert)
    messages = []
    for place in range(expert):
        if first + place != rank:
            messages.append(dist.P2POp(dist.isend, parts[place], first + place, group))
            messages.append(dist.P2POp(dist.irecv, into[place], first + place, group))
    _batch(messages)


def _exchange(message: Tensor, rank: int, partner: int, group: dist.ProcessGroup | None) -> float:
    begun = time.perf_counter()
    if rank < partner:
        send(message, partner, group)
        receive(message, partner, group)
    else:
        receive(message, partner, group)
        send(message, partner, group)
    _settle(message)
    return time.perf_counter() - begun


def _settle(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
