"""Ranks that stand work on in the same processes, and end with a failure or with their parent."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from launch.verify.forked_ranks import RankError, StandingRanks
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow


def _work(topology: Topology, number: int) -> tuple[int, float]:
    assert number != topology.rank, "told to fail"
    total = torch.tensor(float(number))
    dist.all_reduce(total)
    return os.getpid(), total.item()


def test_one_piece_after_another_is_done_by_the_same_processes_until_one_fails() -> None:
    with StandingRanks(2, _work) as ranks:
        first, second = ranks.do(5), ranks.do(6)
        assert (
            [pid for pid, _ in first] == [pid for pid, _ in second] == [each.pid for each in ranks.processes]
        )
        assert [total for _, total in first + second] == [10, 10, 12, 12]
        with pytest.raises(RankError, match=r"rank 1 of 2: (?s:.*)told to fail"):
            ranks.do(1)
        assert not ranks.are_running


def test_they_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            pids = [pid for pid, _ in StandingRanks(2, _work).do(5)]
            (tmp_path / "pids").write_text(" ".join(map(str, pids)))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(left) == 2
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if psutil.pid_exists(pid) and _status(pid) != psutil.STATUS_ZOMBIE]
        time.sleep(0.1)
    assert not left


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE
