"""Endings are named by their cause; the supervisor retries, stops, waits and excludes hosts as it should."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.restart.__main__ import main
from launch.restart.ending import explain, last_step
from launch.restart.history import LOG_FILE, STOPPED_STATUS, Policy, read_log
from launch.restart.look_back import look_back
from launch.restart.supervisor import Supervisor
from train.health.exclusion import EXCLUDED_FILE
from train.health.heartbeat import (
    ENDED_FILE,
    FINDING_FILE,
    Ended,
    Failure,
    Finding,
    Heartbeat,
    Suspect,
    failure_file,
    heartbeat_file,
    write_record,
)
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, UNFIT_STATUS
from train.record.process import pid_space
from train.record.run_folder import SUMMARY_FILE

pytestmark = pytest.mark.slow

FAILED = 1


class ScriptedTries:
    """Tries with scripted endings, each with the records that such a try leaves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder / "records", folder / "run"
        self.run.mkdir()
        self.tries: list[Callable[[], int]] = []
        self.hosts: list[tuple[str, ...]] = []
        self.waits: list[float] = []
        self.said: list[str] = []

    def supervise(self, policy: Policy | None = None, hosts: tuple[str, ...] = (), nodes: int = 0) -> int:
        def start(chosen: tuple[str, ...]) -> int:
            self.hosts.append(chosen)
            return self.tries.pop(0)()

        waits, said = self.waits.append, self.said.append
        return Supervisor(start, policy or Policy(), self.folder, hosts, nodes, said, waits).run()

    def beat(self, rank: int, host: str = "n1", when: float = 0.0) -> None:
        beat = Heartbeat(rank, host, 1 << 30, "", 3, when or time.time(), "forward pass", 5, str(self.run))
        write_record(heartbeat_file(self.folder, rank), beat)

    def fails(self, batch: int, error: str = "ValueError: no", rank: int = 0) -> Callable[[], int]:
        def attempt() -> int:
            (self.run / "metrics.jsonl").write_text(f'{{"step":{batch}}}\n')
            self.beat(rank)
            record = Failure(rank, "n1", time.time(), batch, error)
            write_record(failure_file(self.folder, rank), record)
            return FAILED

        return attempt

    def hangs(self, batch: int, host: str) -> Callable[[], int]:
        def attempt() -> int:
            (self.run / "metrics.jsonl").write_text(f'{{"step":{batch}}}\n')
            self.beat(1, host)
            finding = Finding(0.0, batch, 60.0, "", [0], [Suspect(1, host, "is stopped")])
            write_record(self.folder / FINDING_FILE, finding)
            return HANG_STATUS

        return attempt


@pytest.fixture
def job(tmp_path: Path) -> ScriptedTries:
    return ScriptedTries(tmp_path)


def test_a_job_is_started_again_until_it_is_done(job: ScriptedTries) -> None:
    job.tries = [job.fails(3), job.hangs(7, "n1"), lambda: 0]
    assert job.supervise() == 0
    log = read_log(job.folder)
    assert [line["kind"] for line in log] == ["exception", "hang", "finished"]
    assert [line["batch"] for line in log[:2]] == [3, 7]
    assert "rank 0 on n1: ValueError: no" in log[0]["line"]
    assert [line["next"] for line in log] == ["restart", "restart", "end"]


def test_a_failure_that_repeats_at_the_same_batch_stops_with_a_diagnosis(job: ScriptedTries) -> None:
    job.tries = [job.fails(3), job.fails(9), job.fails(9), job.fails(9), lambda: 0]
    assert job.supervise() == STOPPED_STATUS
    assert len(job.tries) == 1, "the try after the third failure at batch 9 must not be made"
    assert "3 failures in a row after batch 9" in job.said[-1] and "same error" in job.said[-1]


def test_waits_double_while_nothing_is_gained_and_the_limit_holds(job: ScriptedTries) -> None:
    policy = Policy(restarts=3, same_batch=99, backoff_seconds=5, longest_backoff_seconds=15)
    job.tries = [job.fails(9), job.fails(3), job.fails(5), job.fails(10), *[job.fails(8)] * 9]
    assert job.supervise(policy) == STOPPED_STATUS
    assert job.waits == [0, 5, 10, 0, 5, 10, 15]
    assert "without progress" in job.said[-1]


def test_a_job_that_is_told_to_end_while_it_waits_is_not_started_again(job: ScriptedTries) -> None:
    job.tries = [job.fails(3), job.fails(3), lambda: 0]
    supervisor = Supervisor(lambda _: job.tries.pop(0)(), Policy(), job.folder, say=job.said.append)

    def sleep(seconds: float) -> None:
        supervisor.is_told_to_end = seconds > 0

    supervisor.sleep = sleep
    assert supervisor.run() == FAILED and len(job.tries) == 1


def test_ranks_that_saved_and_ended_are_no_failure_whatever_their_launcher_says(job: ScriptedTries) -> None:
    def ends_where_the_layout_changes() -> int:
        job.beat(0)
        write_record(job.folder / ENDED_FILE, Ended(PREEMPTED_STATUS))
        return 128 + signal.SIGTERM  # srun's

    job.tries = [ends_where_the_layout_changes, ends_where_the_layout_changes, lambda: 0]
    assert job.supervise(Policy(restarts=0, same_batch=1), hosts=("n1", "n2"), nodes=1) == 0
    log = read_log(job.folder)
    assert [(line["kind"], line["excluded"]) for line in log[:2]] == [("preempted", None)] * 2
    assert job.waits == [0, 0] and job.hosts == [("n1",)] * 3


def test_a_recipe_that_is_wrong_is_not_tried_again(job: ScriptedTries) -> None:
    job.tries = [lambda: 2, lambda: 0]
    assert job.supervise() == 2
    assert len(job.tries) == 1


def test_a_bad_host_is_excluded_while_there_is_a_spare_one(job: ScriptedTries) -> None:
    job.tries = [job.hangs(3, "n2"), job.hangs(5, "n1"), job.fails(6), lambda: 0]
    assert job.supervise(hosts=("n1", "n2", "n3"), nodes=2) == 0
    assert job.hosts == [("n1", "n2"), ("n1", "n3"), ("n1", "n3"), ("n1", "n3")]
    assert any("no spare host" in line for line in job.said)
    job.hosts, job.tries = [], [lambda: 0]
    assert job.supervise(hosts=("n1", "n2", "n3"), nodes=2) == 0
    assert job.hosts == [("n1", "n3")], "a later supervisor remembers"


def test_the_cause_is_named_and_not_the_consequence(job: ScriptedTries) -> None:
    job.folder.mkdir()
    peer = "RuntimeError: Connection closed by peer [127.0.0.1]:3"
    job.fails(4, peer, rank=0)()
    job.beat(1, "n2", when=1.0)
    ending = explain(FAILED, job.folder)
    assert (ending.kind, ending.rank, ending.host) == ("killed", 1, "n2")
    job.fails(4, "OutOfMemoryError: CUDA", rank=1)()
    ending = explain(FAILED, job.folder)
    assert (ending.kind, ending.rank) == ("exception", 1) and "OutOfMemory" in ending.line


def test_a_host_whose_ranks_never_came_is_named(job: ScriptedTries) -> None:
    def joins_alone() -> int:
        job.beat(0, "n1")
        line = "JoinError: not all 2 ranks have come within 9 s: ranks 1; look at their nodes"
        write_record(failure_file(job.folder, 0), Failure(0, "n1", time.time(), 0, line))
        return UNFIT_STATUS

    job.tries = [joins_alone, lambda: 0]
    assert job.supervise(hosts=("n1", "n2", "n3"), nodes=2) == 0
    assert job.hosts == [("n1", "n2"), ("n1", "n3")] and "no rank on n2 has begun" in job.said[0]
    joins_alone()
    assert explain(UNFIT_STATUS, job.folder, ("10.0.0.1", "10.0.0.2")).host is None, "other names for them"
    # If the hosts are not known, the ranks' errors are the best evidence.
    joins_alone()
    ending = explain(UNFIT_STATUS, job.folder)
    assert ending.kind == "exception" and "ranks 1" in ending.line


def test_a_host_that_a_recheck_excluded_is_not_chosen(job: ScriptedTries) -> None:
    job.folder.mkdir()
    (job.folder / EXCLUDED_FILE).write_text('{"n1": "CORRUPTION", "n9": "of another job"}')
    job.tries = [lambda: 0]
    assert job.supervise(hosts=("n1", "n2", "n3"), nodes=2) == 0
    assert job.hosts == [("n2", "n3")] and "still excluded: n1" in job.said[0]


def test_the_last_step_is_read_from_the_end(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert last_step(log) == 0
    lines = [f'{{"step":{step},"loss":"{"x" * 50}"}}\n' for step in range(1, 3000)]
    log.write_text("".join(lines) + '{"step":3000,"lo')
    assert last_step(log) == 2999


def test_a_system_that_restarts_by_itself_gets_a_log_and_a_limit(job: ScriptedTries) -> None:
    """Each try reads the records of the previous one, like a supervisor that saw it end."""
    waits: list[float] = []

    def next_try(left_by_the_last: Callable[[], int] | None) -> int:
        if left_by_the_last is not None:
            left_by_the_last()
        return look_back(job.folder, Policy(backoff_seconds=5.0), job.said.append, waits.append)

    def saves(batch: int) -> Callable[[], int]:
        def attempt() -> int:
            job.fails(batch)()
            failure_file(job.folder, 0).unlink()
            write_record(job.folder / ENDED_FILE, Ended(PREEMPTED_STATUS))
            return PREEMPTED_STATUS

        return attempt

    def dies_at_once() -> int:
        return FAILED

    assert next_try(None) == 0 and read_log(job.folder) == []
    unfit = job.fails(7, "UnfitError: n3: GPUs: 7 answer")
    for attempt in (job.fails(3), job.hangs(7, "n2"), saves(9), unfit, dies_at_once):
        assert next_try(attempt) == 0
    log = read_log(job.folder)
    assert [line["kind"] for line in log] == ["exception", "hang", "preempted", "unfit", "unknown"]
    assert [line["host"] for line in log] == ["n1", "n2", None, "n1", None]
    assert waits == [0.0, 0.0, 0.0, 0.0, 5.0, 10.0]

    replays = job.fails(11, "NotFiniteError: batch 12")
    assert next_try(replays) == 0 and read_log(job.folder)[-1]["kind"] == "replay"
    assert next_try(replays) == 0
    assert next_try(replays) == STOPPED_STATUS
    assert "3 failures in a row after batch 11" in job.said[-1]
    # Starting it anyway prints the remedy.
    assert next_try(None) == STOPPED_STATUS and "remove" in job.said[-1]
    (job.folder / LOG_FILE).unlink()
    job.fails(11)()
    (job.run / SUMMARY_FILE).touch()
    assert next_try(None) == 0 and read_log(job.folder)[-1]["kind"] == "finished"


COMMAND = """
import os, pathlib, signal, sys, time
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS
from train.health.heartbeat import Heartbeat, heartbeat_file, write_record
folder = pathlib.Path(os.environ["FINEGRAIN_RECORDS"])
tries = folder / "tries"
count = int(tries.read_text()) if tries.exists() else 0
tries.write_text(str(count + 1))
if count == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "save":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "ready").touch()
    time.sleep(60)
"""


def test_the_command_is_started_again_after_a_kill(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--records", str(tmp_path), "--backoff", "0", "--"]
    assert main([*options, sys.executable, "-c", COMMAND, "end"]) == 0
    assert [line["status"] for line in read_log(tmp_path)] == [-signal.SIGKILL, 0]
    assert "ended by SIGKILL" in capfd.readouterr().err
    assert main(["--show", "--records", str(tmp_path)]) == 0
    assert "finished" in capfd.readouterr().out


def test_a_run_that_would_begin_anew_at_each_try_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    smoke = str(Path(__file__).resolve().parents[3] / "yamls/smoke.yaml")
    assert main(["--", "false", smoke, "on_existing=overwrite"]) == 2
    assert f"{smoke}: on_existing: is overwrite" in capfd.readouterr().err


def test_sigterm_is_passed_on_and_ends_the_job_as_saved(tmp_path: Path) -> None:
    words = ["-m", "launch.restart", "--records", str(tmp_path), "--backoff", "0", "--"]
    process = subprocess.Popen([sys.executable, *words, sys.executable, "-c", COMMAND, "save"])
    end = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == PREEMPTED_STATUS


def test_a_stopped_rank_does_not_outlive_its_job(tmp_path: Path) -> None:
    from launch.restart.__main__ import end_leftovers

    environment = os.environ | {"FINEGRAIN_RECORDS": str(tmp_path.resolve())}
    ours = subprocess.Popen(["sleep", "60"], env=environment)
    other = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(ours.pid, signal.SIGSTOP)
        for rank, process in enumerate((ours, other)):
            beat = Heartbeat(rank, "any", process.pid, pid_space(), 1, 0.0, "", 0, "")
            write_record(heartbeat_file(tmp_path, rank), beat)
        threading.Timer(10, other.kill).start()
        end_leftovers(tmp_path)
        assert ours.wait(timeout=5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        ours.kill()
        other.kill()
        ours.wait()
        other.wait()
