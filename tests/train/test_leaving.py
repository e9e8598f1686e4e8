"""A process that has failed ends without teardown, once what runs at exit has run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 60.0
FIRST = """
import atexit, os, sys, time
from train.leaving import Leaving
"""
RANK = """
leaving = Leaving()
class Late:
    def __del__(self):
        time.sleep(600)
late = Late()
with leaving:
    import torch
    import torch.distributed as dist
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        raise ValueError("no")
    dist.all_reduce(torch.ones(1))
"""


def ended(code: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a program to its end; returns status, output and errors."""
    words = [sys.executable, "-c", FIRST + code, *arguments]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_rank_that_waits_for_a_failed_one_hears_of_it_and_leaves_too(tmp_path: Path) -> None:
    """Neither takes down its interpreter, which would take ten minutes here."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: ended(RANK, rank, str(tmp_path / "store")), "01")
    assert first[0] == second[0] == 1
    assert "ValueError: no" in first[2] and "by peer" in second[2]


def test_what_runs_at_exit_has_run() -> None:
    code = """
leaving = Leaving()
atexit.register(print, "closed", flush=True)
class Late:
    def __del__(self):
        print("taken down", flush=True)
late = Late()
with leaving:
    sys.exit(int(sys.argv[1]))
"""
    assert ended(code, "77") == (77, "closed\n", "")
    assert ended(code, "0") == (0, "closed\ntaken down\n", "")


def test_what_runs_at_exit_has_limited_time() -> None:
    code = """
with Leaving(seconds=0.1):
    atexit.register(time.sleep, 600)
    raise ValueError("no")
"""
    status, _, errors = ended(code)
    assert status == 1 and "ValueError: no" in errors
