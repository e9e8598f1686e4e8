"""The reason that a try of a job ended, from its exit status and its ranks' records. Needs no torch."""

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from train.health.heartbeat import (
    ENDED_FILE,
    FINDING_FILE,
    LOST_HOST_FILE,
    Ended,
    Failure,
    Finding,
    Heartbeat,
    read_record,
    read_records,
)
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, REPLAY_STATUS, UNFIT_STATUS, USAGE_STATUS
from train.record.host_memory import newest_batch
from train.record.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE
from train.record.step_log import STEP

TAIL_BYTES = 1 << 16
PEER_LOST = re.compile(
    r"closed by peer|reset by peer|connection (refused|lost)|broken pipe|socket timeout|timed out waiting|"
    r"remote process exited|ranks have come within|nccl.*(remote|unhandled system) error",
    re.IGNORECASE,
)
"""Errors of a rank whose peer has gone: a consequence, not the cause."""


@dataclass(frozen=True)
class Ending:
    """The end of a try and its reason."""

    status: int
    """Exit status; negative for a signal."""
    kind: str
    """finished, preempted, recipe, hang, unfit, replay, exception, killed or unknown."""
    line: str
    """The reason in one line."""
    batch: int
    """Batches in the run's metrics."""
    checkpoint: int
    """Batch of the newest checkpoint, or copy in this host's memory; 0 if there is none."""
    rank: int | None = None
    """The rank to blame, if known."""
    host: str | None = None
    """The host to blame, if known."""


def explain(status: int, folder: Path, hosts: tuple[str, ...] = ()) -> Ending:
    """Finds the reason that a try ended.

    Args:
        status: the command's exit status; negative for a signal.
        folder: folder of the ranks' records.
        hosts: hosts of the try, as far as known.
    """
    beats = read_records(folder, "beat-*.json", Heartbeat)
    failures = read_records(folder, "failed-*.json", Failure)
    finding = read_record(folder / FINDING_FILE, Finding)
    batch, checkpoint = _progress(beats)

    def ending(kind: str, line: str, rank: int | None = None, host: str | None = None) -> Ending:
        return Ending(status, kind, line, batch, checkpoint, rank, host)

    if status == 0:
        return ending("finished", "finished")
    if status == USAGE_STATUS:
        return ending("recipe", _first_error(failures) or "a mistake in the recipe: see the output")
    if finding is not None:
        first = finding.suspects[0] if finding.suspects else None
        return ending("hang", finding.line, first.rank if first else None, first.host if first else None)
    causes = [failure for failure in failures if not PEER_LOST.search(failure.error)]
    if causes:
        first_failure = min(causes, key=lambda failure: failure.time)
        kind = {REPLAY_STATUS: "replay", UNFIT_STATUS: "unfit"}.get(status, "exception")
        line = f"rank {first_failure.rank} on {first_failure.host}: {first_failure.error}"
        return ending(kind, line, first_failure.rank, first_failure.host)
    ended = read_record(folder / ENDED_FILE, Ended)
    # A launcher that ends ranks a moment after the first has a status of its own: srun 143.
    if status == PREEMPTED_STATUS or (ended is not None and ended.status == PREEMPTED_STATUS):
        return ending("preempted", "told to end, or the next phase has another layout; everything is saved")
    if status == HANG_STATUS:
        return ending("hang", "the watchdog ended a hang, but its finding was not written")
    lost = folder / LOST_HOST_FILE
    if lost.is_file():
        host = lost.read_text().strip()
        return ending("killed", f"the connection to {host} was lost or never came about", host=host)
    seen = {beat.host for beat in beats}
    absent = [host for host in hosts if host not in seen]
    # If no host is among those seen, the ranks use other host names than the list.
    if absent and len(absent) < len(hosts):
        line = f"no rank on {absent[0]} has begun: it is down or cannot reach the others"
        return ending("killed", line, host=absent[0])
    unexplained = [beat for beat in beats if beat.rank not in {failure.rank for failure in failures}]
    if unexplained:
        gone = min(unexplained, key=lambda beat: beat.time)
        line = (
            f"rank {gone.rank} on {gone.host} left no error: killed (out of memory?), or its node is gone "
            f"(last seen in: {gone.where}); {_status_text(status)}"
        )
        return ending("killed", line, gone.rank, gone.host)
    if failures:
        return ending("exception", _first_error(failures))
    return ending("unknown", f"{_status_text(status)}, and no rank left a record: see the output")


def _progress(beats: list[Heartbeat]) -> tuple[int, int]:
    """Returns the batches in the run's metrics and its newest checkpoint's, or copy's on this host."""
    if not beats:
        return 0, 0
    run = Path(beats[0].run)
    newest = max((int(folder.name[6:]) for folder in _checkpoints(run)), default=0)
    return last_step(run / METRICS_FILE), max(newest, newest_batch(run))


def last_step(file: Path) -> int:
    """Returns the step of the last complete line, read from the end of the file; 0 if there is none."""
    if not file.is_file():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = stream.read().splitlines(keepends=True)
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                return int(json.loads(line)[STEP])
            except (ValueError, KeyError, TypeError):
                continue
    return 0


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in (run / CHECKPOINTS_FOLDER).glob("batch-*") if path.name[6:].isdecimal()]


def _first_error(failures: list[Failure]) -> str:
    return min(failures, key=lambda failure: failure.time).error if failures else ""


def _status_text(status: int) -> str:
    if status < 0:
        return f"the command was ended by {signal.Signals(-status).name}"
    return f"the command ended with status {status}"
