"""A hung rank is found in time and named, with its stacks and the collective that others wait in."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.verify.forked_ranks import Ranks
from train.health.collectives import recorded_collectives
from train.health.diagnosis import diagnose
from train.health.heartbeat import (
    ENDED_FILE,
    FINDING_FILE,
    RECORDS_FOLDER,
    Ended,
    Finding,
    Heartbeat,
    Stuck,
    failure_file,
    heartbeat_file,
    ranks_of,
    read_record,
    runs,
    stuck_file,
)
from train.health.watchdog import Watchdog
from train.health.watched import watched
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS
from train.recipe.reliability import Watch
from train.recipe.schema import Recipe
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 2.0
STEPS = 8
HUNG_STEP = 3
Hang = Callable[[Topology], None]


def watch_steps(folder: Path, world_size: int, hang: Hang, output: Path) -> list[int | None]:
    """Runs ranks that all-reduce a tensor in every step and call ``hang`` midway; returns exit codes."""

    def work(topology: Topology) -> None:
        recipe = Watch(hang_seconds=LIMIT_SECONDS, start_seconds=LIMIT_SECONDS)
        with recorded_collectives() as recorder:
            watchdog = Watchdog(recipe, folder, folder, topology, recorder)
            watchdog.start()
            for step in range(STEPS):
                watchdog.move("step", step)
                if step == HUNG_STEP:
                    hang(topology)
                dist.all_reduce(torch.ones(4))
            watchdog.stop()

    with Ranks(world_size, work, output) as ranks:
        return ranks.exit_codes(30)


def all_ended(codes: list[int | None]) -> bool:
    """No rank is left, and the watchdog ended at least one; others may have seen a peer exit first."""
    return HANG_STATUS in codes and None not in codes


def stop_process(topology: Topology) -> None:
    if topology.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_a_lock(topology: Topology) -> None:
    if topology.rank == 2:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


def call_another_collective(topology: Topology) -> None:
    if topology.rank == 0:
        dist.all_gather([torch.ones(4) for _ in range(3)], torch.ones(4))


def test_a_stopped_rank_is_named_with_the_stack_that_it_could_not_write(tmp_path: Path) -> None:
    begun = time.monotonic()
    codes = watch_steps(tmp_path, 3, stop_process, tmp_path / "out")
    assert time.monotonic() - begun < 15 * LIMIT_SECONDS
    assert all_ended(codes) and codes[1] == -signal.SIGKILL
    finding = read_record(tmp_path / FINDING_FILE, Finding)
    assert finding is not None
    assert [suspect.rank for suspect in finding.suspects] == [1]
    assert "is stopped" in finding.suspects[0].why
    assert "stop_process" in finding.suspects[0].stacks
    assert finding.waiting == [0, 2] and "allreduce of 16 bytes (number 4" in finding.collective
    assert "rank 1" in finding.line and finding.line.endswith("ranks 0, 2")


def test_a_rank_that_is_busy_elsewhere_is_named_with_its_stack(tmp_path: Path) -> None:
    codes = watch_steps(tmp_path, 3, wait_for_a_lock, tmp_path / "out")
    assert all_ended(codes)
    finding = read_record(tmp_path / FINDING_FILE, Finding)
    assert finding is not None
    assert [suspect.rank for suspect in finding.suspects] == [2]
    assert "thread MainThread" in finding.suspects[0].stacks
    assert "wait_for_a_lock" in finding.suspects[0].stacks


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    def rest(topology: Topology) -> None:
        time.sleep(LIMIT_SECONDS / 2)

    assert watch_steps(tmp_path, 2, rest, tmp_path / "out") == [0, 0]
    assert not (tmp_path / FINDING_FILE).exists()
    assert read_record(heartbeat_file(tmp_path, 1), Heartbeat) is not None


def test_a_run_that_leaves_of_its_own_will_says_with_which_status(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), watched(Recipe(), tmp_path, Topology()):
        raise SystemExit(PREEMPTED_STATUS)
    folder = tmp_path / RECORDS_FOLDER
    assert read_record(folder / ENDED_FILE, Ended) == Ended(PREEMPTED_STATUS)
    assert not failure_file(folder, 0).exists()


def stuck(rank: int, issued: dict[str, int], *waits: tuple[str, int, str]) -> Stuck:
    waiting = [
        {"group": group, "number": number, "operation": operation, "size_bytes": 8, "since": float(rank)}
        for group, number, operation in waits
    ]
    groups = {"all": runs([0, 1, 2, 3]), "pair": runs([2, 3])}
    return Stuck(rank, f"host{rank}", 7, "update", issued, groups, waiting, f"stack of {rank}")


@pytest.mark.parametrize(
    ("ranks", "written"),
    [
        ([], []),
        ([5], [[5, 1, 1]]),
        (list(range(3072)), [[0, 1, 3072]]),
        (list(range(7, 3072, 128)), [[7, 128, 24]]),
        ([0, 1, 2, 4, 9, 14], [[0, 1, 3], [4, 5, 3]]),
    ],
)
def test_groups_of_thousands_are_written_in_a_few_numbers(ranks: list[int], written: list[list[int]]) -> None:
    assert runs(ranks) == written and ranks_of(written) == ranks


def stop_rank_0(topology: Topology) -> None:
    if topology.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("hang", "per_node", "looks"),
    [
        pytest.param(wait_for_a_lock, 2, 0, id="rank 0"),
        pytest.param(stop_rank_0, 2, 2, id="the first rank of a node"),
        pytest.param(stop_rank_0, 6, 1, id="any"),
    ],
)
def test_one_rank_reads_the_others_records(hang: Hang, per_node: int, looks: int, tmp_path: Path) -> None:
    def work(topology: Topology) -> None:
        readers = tmp_path / f"read-by-{topology.rank}"

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            name = Path(str(arguments[0])).name if event == "open" and arguments else ""
            is_read = event == "open" and len(arguments) > 1 and arguments[1] in ("r", "rb")
            if is_read and name.startswith(("stuck-", "beat-")):
                with readers.open("a") as stream:
                    stream.write(f"{name}\n")

        sys.addaudithook(hook)
        limit = Watch(hang_seconds=LIMIT_SECONDS, start_seconds=LIMIT_SECONDS)
        node = replace(topology, local_rank=topology.rank % per_node, local_world_size=per_node)
        with recorded_collectives() as recorder:
            watchdog = Watchdog(limit, tmp_path, tmp_path, node, recorder)
            watchdog.start()
            for step in range(STEPS):
                watchdog.move("step", step)
                if step == HUNG_STEP:
                    hang(topology)
                dist.all_reduce(torch.ones(4))
            watchdog.stop()

    with Ranks(6, work, tmp_path / "out") as ranks:
        codes = ranks.exit_codes(40)
    assert all_ended(codes)
    finding = read_record(tmp_path / FINDING_FILE, Finding)
    assert finding is not None
    assert [suspect.rank for suspect in finding.suspects] == ([2] if looks == 0 else [0])
    assert [file.name for file in tmp_path.glob("read-by-*")] == [f"read-by-{looks}"]
    assert read_record(stuck_file(tmp_path, looks), Stuck).groups == {"0": [[0, 1, 6]]}  # type: ignore[union-attr]


def test_the_chain_of_waiting_is_followed_to_its_end() -> None:
    records = {
        0: stuck(0, {"all": 9}, ("all", 9, "allreduce")),
        1: stuck(1, {"all": 9}, ("all", 9, "allreduce")),
        # Rank 2 has not reached number 9 because it waits for rank 3 in another group.
        2: stuck(2, {"all": 8, "pair": 5}, ("pair", 5, "alltoall")),
        3: stuck(3, {"all": 8, "pair": 4}),
    }
    finding = diagnose(records, {}, set(), 0.0, 10.0)
    assert [(suspect.rank, suspect.host) for suspect in finding.suspects] == [(3, "host3")]
    assert finding.suspects[0].stacks == "stack of 3"
    assert finding.waiting == [0, 1, 2]


def test_a_rank_that_calls_something_else_is_named() -> None:
    records = {rank: stuck(rank, {"all": 9}, ("all", 9, "allreduce")) for rank in (0, 1, 3)}
    records[2] = stuck(2, {"all": 9}, ("all", 9, "broadcast"))
    finding = diagnose(records, {}, set(), 0.0, 10.0)
    assert [suspect.rank for suspect in finding.suspects] == [2]
    assert "calls broadcast where others call allreduce" in finding.suspects[0].why


def test_nobody_is_named_where_all_wait_in_the_same_collective() -> None:
    records = {rank: stuck(rank, {"all": 9}, ("all", 9, "allreduce")) for rank in range(4)}
    finding = diagnose(records, {}, set(), 0.0, 10.0)
    assert finding.suspects == [] and "network" in finding.line


def test_a_rank_whose_host_is_less_far_ahead_is_not_accused() -> None:
    """On NCCL hosts are ahead of their GPUs: here all GPUs are in number 5, which every rank has issued."""
    records = {
        rank: stuck(rank, {"all": last}, *(("all", number, "allreduce") for number in range(5, last + 1)))
        for rank, last in enumerate((25, 20, 22, 21))
    }
    finding = diagnose(records, {}, set(), 0.0, 10.0)
    assert finding.suspects == [] and "network" in finding.line
    assert finding.recorded == [
        "group all of ranks 0-3: allreduce of 8 bytes, number 5: ranks 0-3 wait; issued by all"
    ]
    # Rank 2 has come to number 4 only, which is complete.
    records[2] = stuck(2, {"all": 4})
    finding = diagnose(records, {}, set(), 0.0, 10.0)
    assert [suspect.rank for suspect in finding.suspects] == [2]
    assert finding.recorded == [
        "group all of ranks 0-3: allreduce of 8 bytes, number 5: ranks 0-1, 3 wait; not issued by 2 (last: 4)"
    ]
