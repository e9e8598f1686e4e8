"""Supervisors of several hosts, each of which keeps its own launcher: they begin and end every try together.

One, of place 0, leads: it judges endings and writes an order for each try, with the hosts that take part.
Each writes its state next to it, once a second, in the folder of records. Whoever's ranks fail ends the try
for all, and once all have ended the leader orders the next: no launcher starts again, and ranks are forked
from processes that have imported. A host that is silent is replaced by a spare one, or waited for.

Needs of the file system what heartbeats need; clocks are not compared.
"""

import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.restart.history import STOPPED_STATUS
from train.health.exclusion import excluded_hosts
from train.health.heartbeat import read_record, read_records, write_record
from train.recipe.exit_status import PREEMPTED_STATUS
from train.record.process import host_name

ORDER_FILE = "order.json"
BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.1
SILENT_SECONDS = 15.0
"""A host that is waited for and gives no sign for this long is taken for gone."""
KILLED = -9


@dataclass(frozen=True)
class TryOrder:
    """The leader's message to the others: a try, or the end."""

    token: str
    places: list[int]
    """Places of the supervisors that take part, by node."""
    hosts: list[str]
    """Their hosts."""
    is_over: bool = False
    """The try has failed somewhere: all ranks are to end."""
    status: int | None = None
    """Exit status of the job; None until it has ended."""


@dataclass(frozen=True)
class HostState:
    """The state of one host's supervisor."""

    place: int
    host: str
    started: str
    """Identifies its process."""
    count: int = 0
    """Rises with every sign of life."""
    order: str = ""
    """Token of the try that it takes or took part in; empty: none yet."""
    status: int | None = None
    """Exit status of its part; None while it runs."""

    @property
    def is_free(self) -> bool:
        """Whether nothing of a try runs on it."""
        return not self.order or self.status is not None


@dataclass
class Parts:
    """The hosts' parts of a try."""

    starts: dict[int, str]
    """Identifies each place's process."""
    ended: dict[int, int] = field(default_factory=dict)
    """The status of each that has ended, in that order."""


class HostsGoneError(RuntimeError):
    """Hosts that have not come within the limit."""


@dataclass
class HostPart:
    """This host's part in a job of several.

    Args:
        folder: of the records, which all hosts share.
        place: of this supervisor, from 0; those from ``nodes`` on are spare.
        nodes: hosts of a try.
        limit: seconds to wait for hosts.
        run: runs this host's part of a try: of its hosts, its node, and a function that says whether the try
            is over elsewhere; returns its status.
        say: prints a line.
    """

    folder: Path
    place: int
    nodes: int
    limit: float
    run: Callable[[tuple[str, ...], int, Callable[[], bool]], int]
    say: Callable[[str], object] = print
    is_told_to_end: bool = False

    def __post_init__(self) -> None:
        self._seen: dict[int, tuple[HostState, float]] = {}
        """The state of each place as it last changed, and when."""
        self._state = HostState(self.place, host_name(), secrets.token_hex(8))
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._order: TryOrder | None = None
        self._done = ""
        """Token of the last order that this host has followed, or that was there before it."""

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life in this context."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # What was there before is no sign of life, and no order for this process.
        self._look()
        self._done = order.token if (order := self._ordered()) is not None else ""
        self._note()
        thread = threading.Thread(target=self._beat, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            with suppress(OSError):
                self._file(self.place).unlink()

    def lead(self, _hosts: tuple[str, ...] = ()) -> int:
        """Leads a try of all hosts; returns its status, that of the part that failed first.

        Raises:
            HostsGoneError: if too few hosts have come within the limit.
        """
        chosen = self._gather()
        if chosen is None:
            return PREEMPTED_STATUS
        order = TryOrder(
            secrets.token_hex(8), [each.place for each in chosen], [each.host for each in chosen]
        )
        self._give(order)
        parts = Parts({each.place: each.started for each in chosen})
        if self.place in order.places:
            parts.ended[self.place] = self._take_part(order, lambda: self._has_failed(order, parts))
        while len(parts.ended) < len(order.places):
            self._has_failed(order, parts)
            time.sleep(LOOK_SECONDS)
        return next((status for status in parts.ended.values() if status), 0)

    def finish(self, status: int) -> None:
        """Tells the others that the job has ended."""
        self._give(TryOrder(secrets.token_hex(8), [], [], True, status))

    def follow(self) -> int:
        """Takes part in the leader's tries until the job ends; returns its status."""
        while True:
            waited = time.monotonic()
            while (order := self._ordered()) is None or order.token == self._done:
                if self.is_told_to_end:
                    return PREEMPTED_STATUS
                silent = time.monotonic() - max(waited, self._look().get(0, (None, 0.0))[1])
                if silent > self.limit:
                    self.say(f"restart: no sign of the first host's supervisor for {silent:.0f} s: ended")
                    return STOPPED_STATUS
                time.sleep(LOOK_SECONDS)
            self._done = order.token
            if order.status is not None:
                return order.status
            if self.place in order.places and not order.is_over:
                self._take_part(order, functools.partial(self._is_over, order.token))

    def _take_part(self, order: TryOrder, is_over: Callable[[], bool]) -> int:
        self._note(order.token)
        status = self.run(tuple(order.hosts), order.places.index(self.place), is_over)
        self._note(order.token, status)
        return status

    def _is_over(self, token: str) -> bool:
        order = self._ordered()
        return order is not None and (order.token != token or order.is_over)

    def _has_failed(self, order: TryOrder, parts: Parts) -> bool:
        """Looks for parts of other hosts that have ended; if any has failed, the try is over for all."""
        seen = self._look()
        for place in parts.starts.keys() - parts.ended.keys() - {self.place}:
            host = order.hosts[order.places.index(place)]
            state, when = seen.get(place, (None, 0.0))
            is_silent = time.monotonic() - when > SILENT_SECONDS
            if state is None or state.started != parts.starts[place]:
                self.say(f"restart: the supervisor of {host} has ended")
                parts.ended[place] = KILLED
            elif state.order == order.token and state.status is not None:
                parts.ended[place] = state.status
            elif is_silent and (parts.ended or state.order != order.token):
                self.say(f"restart: {host} gives no sign for {SILENT_SECONDS:.0f} s")
                parts.ended[place] = KILLED
        has_failed = any(parts.ended.values())
        if has_failed and self._order == order:
            self._give(replace(order, is_over=True))
        return has_failed

    def _gather(self) -> list[HostState] | None:
        """Waits until enough hosts are free; returns those of the next try, None if told to end."""
        begun, has_said = time.monotonic(), False
        before = self._order or self._ordered()
        known = set(before.places) if before is not None else set()
        while not self.is_told_to_end:
            now, seen = time.monotonic(), self._look()
            out = excluded_hosts(self.folder)
            living = {
                place: state
                for place, (state, when) in seen.items()
                if now - when < SILENT_SECONDS and state.host not in out
            }
            # A spare host replaces one that was there and is gone, or at last one that never came.
            is_late = now - begun > self.limit
            wanted = [
                place
                for place in range(self.nodes)
                if place in living or not (is_late or (place in known and now - begun > SILENT_SECONDS))
            ]
            spare = [place for place in sorted(living) if place >= self.nodes]
            chosen = [*wanted, *spare][: self.nodes]
            if len(chosen) == self.nodes and all(
                place in living and living[place].is_free for place in chosen
            ):
                return [living[place] for place in chosen]
            missing = [str(place) for place in range(self.nodes) if place not in living]
            if is_late:
                raise HostsGoneError(
                    f"hosts {', '.join(missing)} of {self.nodes} have not come in {self.limit:.0f} s, nor "
                    "spare ones; start `launch.restart` on them or on others"
                )
            if missing and not has_said and now - begun > 2 * BEAT_SECONDS:
                has_said = True
                self.say(f"restart: waits for hosts {', '.join(missing)}, up to {self.limit:.0f} s")
            time.sleep(LOOK_SECONDS)
        return None

    def _look(self) -> dict[int, tuple[HostState, float]]:
        """Reads all states; a time of minus infinity is that of a state that has not changed yet."""
        is_first = not self._seen
        there = {int(file.stem.removeprefix("host-")) for file in self.folder.glob("host-*.json")}
        self._seen = {place: seen for place, seen in self._seen.items() if place in there}
        for state in read_records(self.folder, "host-*.json", HostState):
            before = self._seen.get(state.place)
            if before is None or before[0] != state:
                when = float("-inf") if is_first and before is None else time.monotonic()
                self._seen[state.place] = state, when
        self._seen[self.place] = self._state, time.monotonic()
        return self._seen

    def _note(self, order: str = "", status: int | None = None) -> None:
        with self._lock:
            self._state = replace(self._state, order=order, status=status, count=self._state.count + 1)
            write_record(self._file(self.place), self._state)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self._note(self._state.order, self._state.status)

    def _give(self, order: TryOrder) -> None:
        self._order = order
        write_record(self.folder / ORDER_FILE, order)

    def _ordered(self) -> TryOrder | None:
        return read_record(self.folder / ORDER_FILE, TryOrder)

    def _file(self, place: int) -> Path:
        return self.folder / f"host-{place:05d}.json"
