"""A pytest plugin that notes which lines a test file runs, also in processes that it forks.

``pytest -p launch.experiments.seen_lines FILE`` with FINEGRAIN_SEEN, a folder: each process leaves a file
there. Python 3.12 and newer, whose monitoring costs next to nothing, as every line is reported once.
"""

import json
import multiprocessing.util
import os
import sys
from pathlib import Path
from types import CodeType

SEEN_VARIABLE = "FINEGRAIN_SEEN"
ROOT = str(Path(__file__).resolve().parents[2]) + os.sep
FOLDERS = tuple(ROOT + name + os.sep for name in ("train", "data"))

_seen: dict[str, set[int]] = {}


def pytest_configure() -> None:
    """Starts watching; pytest calls it before any test is imported."""
    monitoring = sys.monitoring
    monitoring.use_tool_id(monitoring.COVERAGE_ID, "seen_lines")
    monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, _note)
    monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)
    multiprocessing.util.register_after_fork(_note, _write_at_end)


def pytest_unconfigure() -> None:
    """Writes what this process has run."""
    _write()


def read_seen(folder: Path) -> dict[str, list[int]]:
    """Returns the lines that all processes of a test file have run, by file below the root."""
    lines: dict[str, set[int]] = {}
    for file in folder.glob("*.json"):
        for name, found in json.loads(file.read_text()).items():
            lines.setdefault(name, set()).update(found)
    return {name: sorted(found) for name, found in sorted(lines.items())}


def _note(code: CodeType, line: int) -> object:
    if code.co_filename.startswith(FOLDERS):
        _seen.setdefault(code.co_filename.removeprefix(ROOT), set()).add(line)
    return sys.monitoring.DISABLE


def _write_at_end(_: object) -> None:
    multiprocessing.util.Finalize(None, _write, exitpriority=0)


def _write() -> None:
    lines = {name: sorted(found) for name, found in _seen.items()}
    file = Path(os.environ[SEEN_VARIABLE]) / str(os.getpid())
    file.write_text(json.dumps(lines))
    file.rename(file.with_suffix(".json"))  # A rank may be killed while it writes.
