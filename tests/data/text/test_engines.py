"""Processes that run tasks: they end with the job, however that ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_SECONDS = 60.0
JOB = """
import os, sys, time
from pathlib import Path
from data.text.engines import Processes
def slow(job, item):
    Path(job, str(os.getpid())).touch()
    time.sleep(600)
Processes(2).run("", slow, sys.argv[1], range(4))
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_job_that_a_signal_ends(sent: signal.Signals, tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        assert len(workers) == 2
        job.send_signal(sent)
        assert job.wait(PATIENCE_SECONDS) == -sent
        while any(map(_is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_is_running, workers))
    finally:
        job.kill()
        for path in tmp_path.iterdir():
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """True of a process that has not ended; an ended one may wait as a zombie for whoever adopts it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
