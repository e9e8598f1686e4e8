"""Rank 0's store at a start: requests, counted and in closed form, and how fast a store answers.

A group's constructor reads the keys of all its ranks from one TCPStore, which rank 0 serves on one thread: at
thousands of ranks this decides how long a start takes.
"""

import datetime
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

NCCL_ID_BYTES = 128
NCCL_RANKS_PER_ROOT = 128
"""ProcessGroupNCCL's default (TORCH_NCCL_RANKS_PER_ROOT): one more id for each so many ranks."""
PROBE_CLIENTS = 4
PROBE_REQUESTS = 2000
SMALL_BYTES, LARGE_BYTES = 64, 24_000
TIMEOUT = datetime.timedelta(seconds=300)


@dataclass(frozen=True)
class Requests:
    """Calls of a store by all ranks together, and the bytes of the values in them."""

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(self.calls + other.calls, self.bytes + other.bytes)

    def times(self, count: int) -> "Requests":
        """Returns as many as of ``count`` such groups."""
        return Requests(self.calls * count, self.bytes * count)


@dataclass(frozen=True)
class StoreSpeed:
    """Requests that one TCPStore serves, and in which time."""

    calls_per_second: float
    """Of small values."""
    bytes_per_second: float
    """Of large values, the time of their calls included."""

    def seconds(self, requests: Requests) -> float:
        """Returns how long it serves these requests."""
        return requests.calls / self.calls_per_second + requests.bytes / self.bytes_per_second


class CountingStore(dist.Store):
    """Counts what is asked of a store, and asks it.

    Args:
        store: what answers; need not be torch's.
    """

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store = store
        self.calls: Counter[str] = Counter()
        self.bytes = 0
        self.keys: dict[str, int] = {}
        """Bytes of the keys that were written."""

    def total(self) -> Requests:
        """Returns all that was asked."""
        return Requests(self.calls.total(), self.bytes)

    def set(self, key: str, value: str | bytes) -> None:
        """Writes a key."""
        self._count("set", value)
        self.keys[key] = len(value)
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        """Waits for a key and reads it."""
        value: bytes = self.store.get(key)
        self._count("get", value)
        return value

    def add(self, key: str, amount: int) -> int:
        """Adds to a number."""
        self._count("add")
        return int(self.store.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        """Returns whether all keys are there."""
        self._count("check")
        return bool(self.store.check(keys))

    def wait(self, keys: list[str], timeout: datetime.timedelta = TIMEOUT) -> None:
        """Waits for keys."""
        self._count("wait")
        self.store.wait(keys, timeout)

    def append(self, key: str, value: str | bytes) -> None:
        """Appends to a key."""
        self._count("append", value)
        self.store.append(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Waits for several keys and reads them."""
        values: list[bytes] = self.store.multi_get(keys)
        self._count("multi_get", *values)
        return values

    def multi_set(self, keys: list[str], values: Sequence[str | bytes]) -> None:
        """Writes several keys."""
        self._count("multi_set", *values)
        self.store.multi_set(keys, values)

    def has_extended_api(self) -> bool:
        """Returns whether several keys can be read at once, as of a TCPStore; no request."""
        return bool(self.store.has_extended_api())

    def clone(self) -> "CountingStore":
        """Returns this store, which counts on."""
        return self

    def _count(self, call: str, *values: str | bytes) -> None:
        self.calls[call] += 1
        self.bytes += sum(map(len, values))


def gloo_requests(ranks: int) -> Requests:
    """Returns what the constructors of one gloo group ask of the store, at most.

    Each rank writes a key of its addresses, 154 bytes and 8 for each rank, and waits for and reads that of
    every rank; older torch leaves out its own.
    """
    pairs = ranks * ranks
    return Requests(ranks + 2 * pairs, (ranks + pairs) * gloo_key_bytes(ranks))


def gloo_key_bytes(ranks: int) -> int:
    """Returns the bytes of the key that each rank of a gloo group writes."""
    return 154 + 8 * ranks


def nccl_requests(ranks: int) -> Requests:
    """Returns what the ranks of one NCCL communicator ask of the store, by ProcessGroupNCCL's source.

    A root in every 128 ranks writes an id, and every rank reads all of them in one request.
    """
    roots = -(-ranks // NCCL_RANKS_PER_ROOT)
    return Requests(roots + ranks, NCCL_ID_BYTES * (roots + ranks * roots))


def count_gloo(ranks: int) -> tuple[list[CountingStore], list[dist.ProcessGroup]]:
    """Makes one gloo group of ranks in threads of this process.

    Returns:
        What each rank asked of the store, and its side of the group, which is open as long as it is kept.
    """
    shared = dist.HashStore()
    stores = [CountingStore(shared) for _ in range(ranks)]
    groups: list[Any] = [None] * ranks

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(stores[rank], rank, ranks, TIMEOUT)

    in_threads([functools.partial(join, rank) for rank in range(ranks)])
    return stores, groups


def measure_store() -> StoreSpeed:
    """Measures a TCPStore of this machine that several clients ask at once, for about a second."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    clients = [dist.TCPStore("127.0.0.1", server.port, None, False, TIMEOUT) for _ in range(PROBE_CLIENTS)]
    seconds = {}
    for size in (SMALL_BYTES, LARGE_BYTES):
        server.set("key", "x" * size)

        begun = time.perf_counter()
        in_threads([functools.partial(ask, client) for client in clients])
        seconds[size] = (time.perf_counter() - begun) / (PROBE_CLIENTS * PROBE_REQUESTS)
    small, large = seconds.values()
    return StoreSpeed(1 / small, LARGE_BYTES / large)


def ask(client: dist.Store) -> None:
    """Reads one key many times."""
    for _ in range(PROBE_REQUESTS):
        client.get("key")


def in_threads(works: list[Callable[[], None]]) -> None:
    """Does all at once, each in a thread of its own."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
