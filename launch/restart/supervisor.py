"""Starts a job again until it is done, and says why each try ended.

Every ending but three is followed by another try, which resumes from the newest whole checkpoint: a run
that is done, a mistake in the recipe, and a SIGTERM that was meant for the supervisor too. Tries that gain
nothing wait longer each time and are counted; a failure that comes back at the same batch is no accident
and stops the job with a diagnosis. A host that hangs or vanishes is left out where there is a spare one.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.restart.ending import Ending, explain
from train.exit_status import PREEMPTED_STATUS
from train.watch.records import clear_records, host_name

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
class Supervisor:
    """Runs one job to its end.

    Args:
        start: runs one try on the given hosts and returns its exit status, negative for a signal.
        policy: limits.
        folder: of the ranks' records; the log is kept there too.
        hosts: hosts to choose from; empty where something else places the ranks.
        nodes: how many of them a try takes.
        say: prints a line.
        sleep: waits, in seconds.
    """

    start: Callable[[tuple[str, ...]], int]
    policy: Policy
    folder: Path
    hosts: tuple[str, ...] = ()
    nodes: int = 0
    say: Callable[[str], object] = print
    sleep: Callable[[float], object] = time.sleep
    is_told_to_end: bool = False
    """Set by a signal handler: the job was told to end, and is not started again."""
    endings: list[Ending] = field(default_factory=list)
    _furthest: int = -1
    _idle: int = 0
    """Failures in a row that gained nothing."""

    def run(self) -> int:
        """Tries until the job is done or another try would not help; returns the exit status."""
        self.folder.mkdir(parents=True, exist_ok=True)
        excluded = self._excluded_before()
        while True:
            chosen = tuple(host for host in self.hosts if host not in excluded)[: self.nodes]
            begun = time.time()
            clear_records(self.folder)
            ending = explain(self.start(chosen), self.folder)
            self.endings.append(ending)
            verdict = self._judge(ending)
            bad = self._bad_host(ending, excluded) if verdict is None else None
            if bad is not None:
                excluded.append(bad)
            wait = 0.0 if verdict is not None or ending.kind == "preempted" else self._backoff()
            self._log(ending, begun, verdict, bad, wait)
            if verdict is not None:
                return verdict
            left_out = f"; {bad} is left out from now on" if bad else ""
            self.say(
                f"restart: {ending.kind} after batch {ending.batch}: {ending.line}{left_out}; starting "
                f"again from batch {ending.checkpoint} in {wait:.0f} s"
            )
            self.sleep(wait)

    def _judge(self, ending: Ending) -> int | None:
        """The exit status if this was the last try, else None."""
        if ending.kind == "finished":
            return 0
        if ending.kind == "recipe":
            self.say(f"restart: not tried again, the recipe must be corrected: {ending.line}")
            return ending.status
        if self.is_told_to_end:
            return PREEMPTED_STATUS if ending.kind == "preempted" else ending.status
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

    def _same_batch(self) -> list[Ending]:
        """The last failures, as far as they were at one batch."""
        failures = [ending for ending in self.endings if ending.kind != "preempted"]
        same: list[Ending] = []
        for ending in reversed(failures):
            if same and ending.batch != same[0].batch:
                break
            same.append(ending)
        return same

    def _backoff(self) -> float:
        return min(self.policy.longest_backoff_seconds, self.policy.backoff_seconds * 2.0**self._idle)

    def _bad_host(self, ending: Ending, excluded: list[str]) -> str | None:
        """The host to leave out from now on, if there is a spare one in its place."""
        if ending.kind not in BLAMES_HOST or ending.host not in self.hosts or ending.host in excluded:
            return None
        if len(self.hosts) - len(excluded) <= self.nodes:
            self.say(f"restart: {ending.host} is suspect, and there is no spare host: it is tried again")
            return None
        return ending.host

    def _excluded_before(self) -> list[str]:
        """Hosts that an earlier supervisor of this job left out."""
        found = [line["excluded"] for line in read_log(self.folder) if line.get("excluded")]
        excluded = [host for host in dict.fromkeys(found) if host in self.hosts]
        if excluded:
            self.say(f"restart: left out as before: {', '.join(excluded)}; {LOG_FILE} says why")
        while excluded and len(self.hosts) - len(excluded) < self.nodes:
            self.say(f"restart: too few hosts are left: {excluded[0]} is taken back")
            excluded.pop(0)
        return excluded

    def _log(self, ending: Ending, begun: float, verdict: int | None, bad: str | None, wait: float) -> None:
        line = {
            "try": len(self.endings),
            "supervisor": host_name(),
            "begun": round(begun, 3),
            "seconds": round(time.time() - begun, 3),
            **asdict(ending),
            "excluded": bad,
            "next": "restart" if verdict is None else "end",
            "wait_seconds": wait,
        }
        with (self.folder / LOG_FILE).open("a") as log:
            log.write(json.dumps(line) + "\n")


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


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Every try that the log holds, oldest first."""
    file = folder / LOG_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
