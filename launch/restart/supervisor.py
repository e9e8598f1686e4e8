"""The supervisor: restarts a job until it is finished and logs why each try ended.

Three endings are final: a finished run, a mistake in the recipe, and a SIGTERM to the supervisor itself.
After any other the job resumes from the newest valid checkpoint. Tries without progress are counted and wait
longer each time; repeated failures at the same batch stop the job with a diagnosis. A host that hangs or
vanishes is excluded if there is a spare one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.restart.ending import Ending, explain
from launch.restart.history import BLAMES_HOST, LOG_FILE, History, Policy, read_log, write_log
from train.health.exclusion import excluded_hosts
from train.health.heartbeat import clear_records
from train.recipe.exit_status import PREEMPTED_STATUS


@dataclass
class Supervisor:
    """Runs a job to its end.

    Args:
        start: runs one try on the given hosts; returns its exit status, negative for a signal.
        policy: limits.
        folder: folder of the ranks' records and of the log.
        hosts: hosts to choose from; empty if something else places the ranks.
        nodes: hosts per try.
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
    """Set by a signal handler: the job is stopped and not restarted."""

    def __post_init__(self) -> None:
        self.history = History(self.policy, self.say)

    def run(self) -> int:
        """Runs tries until the job is finished or another would not help; returns the exit status."""
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
            exclusion = f"; {bad} is excluded from now on" if bad else ""
            self.say(
                f"restart: {ending.kind} after batch {ending.batch}: {ending.line}{exclusion}; starting "
                f"again from batch {ending.checkpoint} in {wait:.0f} s"
            )
            self.sleep(wait)
            if self.is_told_to_end:  # while it waited
                return ending.status

    def _judge(self, ending: Ending) -> int | None:
        """Returns the exit status if this was the last try, else None."""
        if self.is_told_to_end and ending.kind not in ("finished", "recipe"):
            self.history.endings.append(ending)
            return PREEMPTED_STATUS if ending.kind == "preempted" else ending.status
        return self.history.judge(ending)

    def _bad_host(self, ending: Ending, excluded: list[str]) -> str | None:
        """Returns the host to exclude from now on, if a spare one can replace it."""
        if ending.kind not in BLAMES_HOST or ending.host not in self.hosts or ending.host in excluded:
            return None
        if len(self.hosts) - len(excluded) <= self.nodes:
            self.say(f"restart: {ending.host} is suspect, but there is no spare host: trying it again")
            return None
        return ending.host

    def _excluded_before(self) -> list[str]:
        """Returns the hosts that earlier supervisors of this job excluded, or that rechecks found."""
        found = [line["excluded"] for line in read_log(self.folder) if line.get("excluded")]
        found += excluded_hosts(self.folder)
        excluded = [host for host in dict.fromkeys(found) if host in self.hosts]
        if excluded:
            self.say(f"restart: still excluded: {', '.join(excluded)}; {LOG_FILE} says why")
        while excluded and len(self.hosts) - len(excluded) < self.nodes:
            self.say(f"restart: too few hosts are left: using {excluded[0]} again")
            excluded.pop(0)
        return excluded
