"""The history of a job's tries: their log and the decision whether to try again."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launch.restart.ending import Ending
from train.record.process import host_name

LOG_FILE = "restarts.jsonl"
STOPPED_STATUS = 70
"""Exit status (EX_SOFTWARE) of a job for which another try would not help."""
BLAMES_HOST = ("hang", "killed", "unfit")
"""Kinds of endings after which the blamed host is excluded."""


@dataclass(frozen=True)
class Policy:
    """Limits on restarts."""

    restarts: int = 10
    """Restarts in a row without progress, that is without a batch beyond the furthest so far."""
    same_batch: int = 3
    """Failures in a row at the same batch that stop the job."""
    backoff_seconds: float = 10.0
    """Wait before a restart after one try without progress, doubled for each further one in a row."""
    longest_backoff_seconds: float = 600.0


@dataclass
class History:
    """The tries so far and the verdict on each.

    Args:
        policy: limits.
        say: prints a line.
    """

    policy: Policy
    say: Callable[[str], object]
    endings: list[Ending] = field(default_factory=list)
    _furthest: int = -1
    _idle: int = 0
    """Failures in a row without progress."""

    def judge(self, ending: Ending) -> int | None:
        """Adds a try; returns the exit status of the job if it was the last one, else None."""
        self.endings.append(ending)
        if ending.kind == "finished":
            return 0
        if ending.kind == "recipe":
            self.say(f"restart: stopped: the recipe must be corrected: {ending.line}")
            return ending.status
        if ending.kind == "preempted":
            return None
        self._idle = 0 if ending.batch > self._furthest else self._idle + 1
        self._furthest = max(self._furthest, ending.batch)
        same = self._same_batch()
        if len(same) >= self.policy.same_batch:
            self.say(f"restart: stopped: {diagnosis(same)}")
            return STOPPED_STATUS
        if self._idle > self.policy.restarts:
            self.say(
                f"restart: stopped: {self._idle} failures in a row without progress; the last: {ending.line}"
            )
            return STOPPED_STATUS
        return None

    def wait_seconds(self) -> float:
        """Returns the wait before the next try: none after one that has gained a batch."""
        if not self._idle or (self.endings and self.endings[-1].kind == "preempted"):
            return 0.0
        return min(self.policy.longest_backoff_seconds, self.policy.backoff_seconds * 2.0 ** (self._idle - 1))

    def _same_batch(self) -> list[Ending]:
        """Returns the latest failures in a row at the same batch, newest first."""
        failures = [ending for ending in self.endings if ending.kind != "preempted"]
        same: list[Ending] = []
        for ending in reversed(failures):
            if same and ending.batch != same[0].batch:
                break
            same.append(ending)
        return same


def diagnosis(same: list[Ending]) -> str:
    """Describes repeated failures at the same batch, newest first, with a remedy."""
    newest = same[0]
    lines = {ending.line for ending in same}
    hosts = {ending.host for ending in same}
    where = f"{len(same)} failures in a row after batch {newest.batch}"
    if len(hosts) == 1 and None not in hosts and newest.kind in BLAMES_HOST:
        remedy = f"every time on {newest.host}: exclude it and check it"
    elif newest.kind == "replay":
        remedy = "not a transient hardware error: read the batch's documents, or set guard.nonfinite=skip"
    elif len(lines) == 1:
        remedy = "the same error every time: the code or the data of this batch, not the machines"
    else:
        remedy = "different errors: check the batch, the file system and the network"
    return f"{where}: {newest.line}; {remedy}"


def write_log(folder: Path, number: int, ending: Ending, begun: float, is_last: bool, **more: Any) -> None:
    """Adds a try to the log.

    Args:
        folder: folder of the log.
        number: number of the try, from 1.
        ending: its end.
        begun: its start, in seconds since 1970.
        is_last: True if no other try follows.
        more: further fields.
    """
    line = {
        "try": number,
        "supervisor": host_name(),
        "begun": round(begun, 3),
        "seconds": round(time.time() - begun, 3),
        **asdict(ending),
        "excluded": None,
        "next": "end" if is_last else "restart",
        **more,
    }
    with (folder / LOG_FILE).open("a") as log:
        log.write(json.dumps(line) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns all tries in the log, oldest first; lines that can't be read are passed over."""
    file = folder / LOG_FILE
    needed, found = {"try", "begun", "seconds", "excluded", *(each.name for each in fields(Ending))}, []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict) and tree.keys() >= needed:
            found.append(tree)
    return found


def ending_of(line: dict[str, Any]) -> Ending:
    """Returns the ending that a line of the log records."""
    return Ending(**{each.name: line[each.name] for each in fields(Ending)})
