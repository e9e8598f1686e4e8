"""Starts a job again until it is done, and says why each try ended.

Every ending but three is followed by another try, which resumes from the newest whole checkpoint: a run
that is done, a mistake in the recipe, and a SIGTERM that was meant for the supervisor too. Tries that gain
nothing wait longer each time and are counted; a failure that comes back at the same batch is no accident
and stops the job with a diagnosis. A host that hangs or vanishes is left out where there is a spare one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.restart.ending import Ending, explain
from launch.restart.history import BLAMES_HOST, LOG_FILE, History, Policy, read_log, write_log
from train.health.heartbeat import clear_records
from train.recipe.exit_status import PREEMPTED_STATUS


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

    def __post_init__(self) -> None:
        self.history = History(self.policy, self.say)

    def run(self) -> int:
        """Tries until the job is done or another try would not help; returns the exit status."""
        self.folder.mkdir(parents=True, exist_ok=True)
        excluded = self._excluded_before()
        while True:
            chosen = tuple(host for host in self.hosts if host not in excluded)[: self.nodes]
            begun = time.time()
            clear_records(self.folder)
            ending = explain(self.start(chosen), self.folder, chosen)
            verdict = self._judge(ending)
            bad = self._bad_host(ending, excluded) if verdict is None else None
            if bad is not None:
                excluded.append(bad)
            wait = 0.0 if verdict is not None else self.history.wait_seconds()
            number = len(self.history.endings)
            is_last = verdict is not None
            write_log(self.folder, number, ending, begun, is_last, excluded=bad, wait_seconds=wait)
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
        if self.is_told_to_end and ending.kind not in ("finished", "recipe"):
            self.history.endings.append(ending)
            return PREEMPTED_STATUS if ending.kind == "preempted" else ending.status
        return self.history.judge(ending)

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
