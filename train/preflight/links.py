"""How fast ranks reach each other, and which rank or pair is slow.

Pairs take turns as in a tournament, all ranks at once: in each round everybody exchanges a message with one
other, there and back, a few times. The tournament is held several times over, so that the measurements of a
link lie apart. A link's time is the median over the tournaments of the shortest exchange in each: noise only
adds, and a burst of it spoils one tournament of several. A rank's time is the median over its links, so that
a slow partner does not accuse it. Links inside a node and between nodes are held to their own kind. A rank
or pair is slow if it takes several times as long as the median of the others, and is so each time: who is
suspect is measured again, and only what is found every time is named.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE_BYTES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Large enough on a GPU that a port at a quarter of its bandwidth stands out: 3 ms there and back at
400 Gbit/s (not yet run on a GPU)."""
COLLECTIVE_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}
"""Large enough that thousands of ranks exchange more than latencies (not yet run on a GPU)."""
MOST_ROUNDS = 16
"""Partners of each rank; all of them up to 17 ranks."""
TOURNAMENTS = 5
EXCHANGES = 3
"""Of a pair in a tournament."""
CONFIRMATIONS = 2
"""Measurements more that a suspect has to be found in."""
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all")
REPEATS = 7
"""Of a collective."""
LEAST_SECONDS = {"cpu": 0.01, "cuda": 0.0005}
"""Links that are slower by less than this are let go: a host's scheduler does as much where ranks share
cores. The GPU's not yet run on one."""


@dataclass(frozen=True)
class Links:
    """What was measured and who is slow."""

    seconds: dict[tuple[int, int], float]
    """There and back, by pair; links inside nodes scaled by :func:`by_kind`."""
    slow_ranks: list[int]
    slow_pairs: list[tuple[int, int]]
    """Slow pairs of ranks that are not slow themselves."""
    usual_inside: float | None
    """The median link inside a node; None where there is none."""
    usual_between: float | None
    """The median link between nodes; None on one node."""

    @property
    def usual(self) -> float:
        """The median link between ranks that are not slow."""
        sound = [took for pair, took in self.seconds.items() if not set(pair) & set(self.slow_ranks)]
        return statistics.median(sound or self.seconds.values())


def measure_links(device: torch.device, factor: float, nodes: Sequence[str] = ()) -> Links:
    """Measures pairs of ranks; every rank calls it and gets the same answer.

    Args:
        device: that the messages lie on.
        factor: over the median of the others from which something is slow.
        nodes: name of each rank's node; empty: all are on one.
    """
    found = _measure_once(device, factor, nodes)
    for _ in range(CONFIRMATIONS):
        if not found.slow_ranks and not found.slow_pairs:
            break
        again = _measure_once(device, factor, nodes)
        found = replace(
            again,
            slow_ranks=[rank for rank in again.slow_ranks if rank in found.slow_ranks],
            slow_pairs=[pair for pair in again.slow_pairs if pair in found.slow_pairs],
        )
    return found


def _measure_once(device: torch.device, factor: float, nodes: Sequence[str]) -> Links:
    rank, world = dist.get_rank(), dist.get_world_size()
    size = MESSAGE_BYTES[device.type]
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    mine: dict[tuple[int, int], list[float]] = {}
    for _ in range(TOURNAMENTS):
        for pairs in rounds(world):
            partner = pairs.get(rank)
            if partner is not None:
                times = [_exchange(message, rank, partner) for _ in range(EXCHANGES)]
                if rank < partner:
                    mine.setdefault((rank, partner), []).append(min(times))
            dist.barrier()
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
    """Times of all links, those inside nodes scaled so that they compare with those between nodes.

    Args:
        inside: seconds by pair of ranks of one node.
        between: of two nodes.
    """
    if not inside or not between:
        return inside | between
    # The low median: where half of a kind's links are slow, the others are what is usual.
    scale = statistics.median_low(between.values()) / statistics.median_low(inside.values())
    return {pair: took * scale for pair, took in inside.items()} | between


def find_slow(
    seconds: dict[tuple[int, int], float], factor: float, least: float = 0.0
) -> tuple[list[int], list[tuple[int, int]]]:
    """Slow ranks, and slow pairs of other ranks.

    Args:
        seconds: by pair.
        factor: over the median of the others from which something is slow.
        least: seconds above that median which are let go.
    """
    links: dict[int, list[float]] = {}
    for pair, took in seconds.items():
        for rank in pair:
            links.setdefault(rank, []).append(took)
    of_rank = {rank: statistics.median_low(links[rank]) for rank in sorted(links)}
    fastest = min(seconds.values(), default=0.0)
    slow_ranks = []
    for rank, median in of_rank.items():
        # No median is below the fastest: of thousands of ranks only a few must be looked at.
        if median <= max(factor * fastest, fastest + least):
            continue
        others = [took for pair, took in seconds.items() if rank not in pair]
        # With two ranks there is nobody to compare with.
        if others and median > max(factor * (usual := statistics.median(others)), usual + least):
            slow_ranks.append(rank)
    rest = {pair: took for pair, took in seconds.items() if not set(pair) & set(slow_ranks)}
    usual = statistics.median(rest.values()) if rest else 0.0
    bound = max(factor * usual, usual + least)
    slow_pairs = [pair for pair, took in rest.items() if len(rest) > 2 and took > bound]
    return slow_ranks, slow_pairs


def rounds(world: int, most: int = MOST_ROUNDS) -> Iterator[dict[int, int]]:
    """Partners by rank, round by round: a round-robin tournament by the circle method."""
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


def measure_collectives(device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """Bus bandwidth of three collectives in Gbit/s, by name, equal on all ranks.

    It is what each rank sends over the time, as NVIDIA's nccl-tests define it: 2 (n-1)/n of the bytes for
    all-reduce, (n-1)/n for the others.
    """
    world = dist.get_world_size()
    count = COLLECTIVE_BYTES[device.type] // 4 // world * world
    whole, out = torch.zeros(count, device=device), torch.empty(count, device=device)
    part = torch.zeros(count // world, device=device)
    share = (world - 1) / world
    works: list[tuple[Callable[[], object], float]] = [
        (lambda: dist.all_reduce(whole), 2 * share),
        (lambda: dist.all_gather_into_tensor(out, part), share),
        (lambda: dist.all_to_all_single(out, whole), share),
    ]
    found = {}
    for name, (work, parts) in zip(COLLECTIVES, works, strict=True):
        times = []
        for _ in range(repeats):
            dist.barrier()
            begun = time.perf_counter()
            work()
            _settle(whole)
            times.append(time.perf_counter() - begun)
        slowest = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found[name] = 8e-9 * 4 * count * parts / slowest.item()
    return found


def _exchange(message: Tensor, rank: int, partner: int) -> float:
    begun = time.perf_counter()
    if rank < partner:
        dist.send(message, partner)
        dist.recv(message, partner)
    else:
        dist.recv(message, partner)
        dist.send(message, partner)
    _settle(message)
    return time.perf_counter() - begun


def _settle(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
