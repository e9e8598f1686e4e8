"""Tries of a job, one after the other: their log, and whether another one is worth it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launch.restart.ending import Ending
from train.health.heartbeat import host_name

LOG_FILE = "restarts.jsonl"
STOPPED_STATUS = 70
"""Exit status (EX_SOFTWARE) of a job that another try would not help."""
BLAMES_HOST = ("hang", "killed", "unfit")
"""Endings after which the host of the named rank is left out."""


@dataclass(frozen=True)
class Policy:
    """How long a supervisor goes on."""

    restarts: int = 10
    """Restarts in a row after which none has trained a batch more than the ones before."""
    same_batch: int = 3
    """Failures in a row at the same batch that stop the job."""
    backoff_seconds: float = 10.0
    """Wait before a restart; doubled for each in a row that gained nothing."""
    longest_backoff_seconds: float = 600.0


@dataclass
class History:
    """The tries so far, judged one by one.

    Args:
        policy: limits.
        say: prints a line.
    """

    policy: Policy
    say: Callable[[str], object]
    endings: list[Ending] = field(default_factory=list)
    _furthest: int = -1
    _idle: int = 0
    """Failures in a row that gained nothing."""

    def judge(self, ending: Ending) -> int | None:
        """Adds a try; returns the exit status if it was the last one, else None."""
        self.endings.append(ending)
        if ending.kind == "finished":
            return 0
        if ending.kind == "recipe":
            self.say(f"restart: not tried again, the recipe must be corrected: {ending.line}")
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
                f"restart: stopped: {self._idle} failures in a row gained no batch; the last: {ending.line}"
            )
            return STOPPED_STATUS
        return None

    def wait_seconds(self) -> float:
        """How long the next try waits."""
        if self.endings and self.endings[-1].kind == "preempted":
            return 0.0
        return min(self.policy.longest_backoff_seconds, self.policy.backoff_seconds * 2.0**self._idle)

    def _same_batch(self) -> list[Ending]:
        """The last failures, as far as they were at one batch."""
        failures = [ending for ending in self.endings if ending.kind != "preempted"]
        same: list[Ending] = []
        for ending in reversed(failures):
            if same and ending.batch != same[0].batch:
                break
            same.append(ending)
        return same


def diagnosis(same: list[Ending]) -> str:
    """What several failures at one batch have in common, newest first, and what to do about it."""
    newest = same[0]
    lines = {ending.line for ending in same}
    hosts = {ending.host for ending in same}
    where = f"{len(same)} failures in a row after batch {newest.batch}"
    if len(hosts) == 1 and None not in hosts and newest.kind in BLAMES_HOST:
        remedy = f"every time on {newest.host}: take it out of the job and check it"
    elif newest.kind == "replay":
        remedy = "no passing fault of a machine: read the batch's documents, or set guard.nonfinite=skip"
    elif len(lines) == 1:
        remedy = "the same error every time: the code or the data of this batch, not the machines"
    else:
        remedy = "different errors: look at what the batch, the file system and the network have in common"
    return f"{where}: {newest.line}; {remedy}"


def write_log(folder: Path, number: int, ending: Ending, begun: float, is_last: bool, **more: Any) -> None:
    """Adds a try to the log.

    Args:
        folder: of the log.
        number: of the try, from 1.
        ending: how it ended.
        begun: seconds since 1970.
        is_last: whether there is no other try.
        more: what else is known of it.
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
    """Every try that the log holds, oldest first."""
    file = folder / LOG_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def ending_of(line: dict[str, Any]) -> Ending:
    """The ending that a line of the log tells of."""
    return Ending(**{each.name: line[each.name] for each in fields(Ending)})
