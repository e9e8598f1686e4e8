"""How fast ranks reach each other, and which rank or pair is slow.

Pairs take turns as in a tournament, all ranks at once: in each round everybody exchanges a message with one
other, there and back, a few times. The tournament is held several times over, so that the measurements of a
link lie apart. A link's time is the median over the tournaments of the shortest exchange in each: noise only
adds, and a burst of it spoils one tournament of several. A rank's time is the median over its links, so that
a slow partner does not accuse it. A rank or pair is slow if it takes several times as long as the median of
the others, and is so each time: who is suspect is measured again, and only what is found every time is named.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE_BYTES = 1 << 18
COLLECTIVE_BYTES = 1 << 24
MOST_ROUNDS = 16
"""Partners of each rank; all of them up to 17 ranks."""
TOURNAMENTS = 5
EXCHANGES = 3
"""Of a pair in a tournament."""
CONFIRMATIONS = 2
"""Measurements more that a suspect has to be found in."""
REPEATS = 7
"""Of a collective."""
LEAST_SECONDS = {"cpu": 0.01, "cuda": 0.0005}
"""Links that are slower by less than this are let go: a host's scheduler does as much where ranks share
cores. The GPU's not yet run on one."""


@dataclass(frozen=True)
class Links:
    """What was measured and who is slow."""

    seconds: dict[tuple[int, int], float]
    """There and back, by pair."""
    slow_ranks: list[int]
    slow_pairs: list[tuple[int, int]]
    """Slow pairs of ranks that are not slow themselves."""

    @property
    def usual(self) -> float:
        """The median link between ranks that are not slow."""
        sound = [took for pair, took in self.seconds.items() if not set(pair) & set(self.slow_ranks)]
        return statistics.median(sound or self.seconds.values())


def measure_links(device: torch.device, factor: float) -> Links:
    """Measures pairs of ranks; every rank calls it and gets the same answer.

    Args:
        device: that the messages lie on.
        factor: over the median of the others from which something is slow.
    """
    found = _measure_once(device, factor)
    for _ in range(CONFIRMATIONS):
        if not found.slow_ranks and not found.slow_pairs:
            break
        again = _measure_once(device, factor)
        found = Links(
            again.seconds,
            [rank for rank in again.slow_ranks if rank in found.slow_ranks],
            [pair for pair in again.slow_pairs if pair in found.slow_pairs],
        )
    return found


def _measure_once(device: torch.device, factor: float) -> Links:
    rank, world = dist.get_rank(), dist.get_world_size()
    message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device=device)
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
    return Links(seconds, *find_slow(seconds, factor, LEAST_SECONDS[device.type]))


def find_slow(
    seconds: dict[tuple[int, int], float], factor: float, least: float = 0.0
) -> tuple[list[int], list[tuple[int, int]]]:
    """Slow ranks, and slow pairs of other ranks.

    Args:
        seconds: by pair.
        factor: over the median of the others from which something is slow.
        least: seconds above that median which are let go.
    """
    ranks = sorted({rank for pair in seconds for rank in pair})
    of_rank = {
        rank: statistics.median_low([took for pair, took in seconds.items() if rank in pair])
        for rank in ranks
    }
    slow_ranks = []
    for rank in ranks:
        others = [took for pair, took in seconds.items() if rank not in pair]
        # With two ranks there is nobody to compare with.
        if others and of_rank[rank] > max(factor * (usual := statistics.median(others)), usual + least):
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
    count = COLLECTIVE_BYTES // 4 // world * world
    whole, out = torch.zeros(count, device=device), torch.empty(count, device=device)
    part = torch.zeros(count // world, device=device)
    share = (world - 1) / world
    works: dict[str, tuple[Callable[[], object], float]] = {
        "all-reduce": (lambda: dist.all_reduce(whole), 2 * share),
        "all-gather": (lambda: dist.all_gather_into_tensor(out, part), share),
        "all-to-all": (lambda: dist.all_to_all_single(out, whole), share),
    }
    found = {}
    for name, (work, parts) in works.items():
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
