"""A look back at the previous try by the next one, for systems that restart jobs by themselves.

Kubernetes, mcli and SkyPilot restart failed jobs without knowing the reason. Before the ranks start, the
first node reads the records of the previous try (``python -m launch.restart --look-back``), adds it to the
log, backs off while there is no progress, and exits with status 70 where the supervisor would stop.
"""

import time
from collections.abc import Callable
from pathlib import Path

from launch.restart.ending import explain
from launch.restart.history import LOG_FILE, STOPPED_STATUS, History, Policy, ending_of, read_log, write_log
from train.health.heartbeat import (
    ENDED_FILE,
    FINDING_FILE,
    Ended,
    Failure,
    Finding,
    Heartbeat,
    clear_records,
    read_record,
    read_records,
)
from train.recipe.exit_status import HANG_STATUS, REPLAY_STATUS, UNFIT_STATUS
from train.record.run_folder import SUMMARY_FILE

BEGUN_FILE = "begun"
"""A file whose modification time is the start of the previous try."""
FAILED_STATUS = 1
STATUS_OF_ERROR = {
    "UnfitError": UNFIT_STATUS,
    "CorruptionError": UNFIT_STATUS,
    "ExcludedError": UNFIT_STATUS,
    "NotFiniteError": REPLAY_STATUS,
    "RollbackError": REPLAY_STATUS,
}
STOPS = ("finished", "preempted", "recipe")
"""Endings at which a supervisor stops although nothing prevents another try."""


def look_back(
    folder: Path,
    policy: Policy,
    say: Callable[[str], object] = print,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Logs the previous try, if there was one, and waits; returns 0 to try again, else 70.

    Args:
        folder: folder of the ranks' records and of the log.
        policy: limits.
        say: prints a line.
        sleep: waits, in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, log = folder / BEGUN_FILE, read_log(folder)
    if log and log[-1]["next"] == "end" and log[-1]["kind"] not in STOPS:
        say(
            f"restart: already stopped after batch {log[-1]['batch']}: {log[-1]['line']}; remove "
            f"{folder / LOG_FILE} once the cause is fixed"
        )
        return STOPPED_STATUS
    wait = 0.0
    if mark.exists():
        history = History(policy, lambda _: None)
        for line in log:
            history.judge(ending_of(line))
        history.say = say
        ending = explain(status_of(folder), folder)
        verdict = history.judge(ending)
        wait = history.wait_seconds() if verdict is None else 0.0
        begun, ended = (
            mark.stat().st_mtime,
            [beat.time for beat in read_records(folder, "beat-*.json", Heartbeat)],
        )
        seconds = round(max(ended, default=begun) - begun, 3)
        number = len(history.endings)
        write_log(folder, number, ending, begun, verdict is not None, seconds=seconds, wait_seconds=wait)
        clear_records(folder)
        if verdict == STOPPED_STATUS:
            return verdict
        if verdict is None:
            say(
                f"restart: {ending.kind} after batch {ending.batch}: {ending.line}; starting again from "
                f"batch {ending.checkpoint} in {wait:.0f} s"
            )
    sleep(wait)
    mark.touch()
    return 0


def status_of(folder: Path) -> int:
    """Returns the exit status that the records of a try imply."""
    beats = read_records(folder, "beat-*.json", Heartbeat)
    if beats and (Path(beats[0].run) / SUMMARY_FILE).exists():
        return 0
    if ended := read_record(folder / ENDED_FILE, Ended):
        return ended.status
    if read_record(folder / FINDING_FILE, Finding):
        return HANG_STATUS
    failures = read_records(folder, "failed-*.json", Failure)
    known = [STATUS_OF_ERROR.get(failure.error.partition(":")[0]) for failure in failures]
    return next((status for status in known if status is not None), FAILED_STATUS)
