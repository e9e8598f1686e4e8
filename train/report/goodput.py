"""Goodput of a run that a supervisor kept going: the share of its time that moved it forward."""

import json
from pathlib import Path

from train.record.run_folder import SUMMARY_FILE
from train.record.summary import Summary

RESTARTS = ".restarts/restarts.jsonl"
"""The supervisor's log of tries, next to the run's folder; it has a line for each try that has ended."""


def goodput(run_dir: Path, summary: Summary) -> float | None:
    """Returns the training time of all batches that count over the time since the first try, in [0, 1].

    What interruptions cost is in the rest: work that was done again, waits, and starts, the first one too.

    Args:
        run_dir: folder of the run.
        summary: of the run, written when it was complete.

    Returns:
        None if no try of it has ended before, or its log cannot be read.
    """
    try:
        seconds = (run_dir / SUMMARY_FILE).stat().st_mtime - tries_of(run_dir)[0]
    except (OSError, IndexError):
        return None
    return min(1.0, summary.seconds / seconds) if seconds > 0 else None


def tries_of(run_dir: Path) -> list[float]:
    """Returns when the supervisor's tries that ended began, in Unix seconds; none without a sound log."""
    run_dir = run_dir.resolve()
    try:
        lines = (run_dir.parent / (run_dir.name + RESTARTS)).read_text().splitlines()
        return [float(json.loads(line)["begun"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return []
