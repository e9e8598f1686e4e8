"""The rendered script with real launchers and ranks, on hosts that are all this machine.

The test with faults is skipped unless FINEGRAIN_HOSTS=1 is set: starting a job four times takes minutes.
FINEGRAIN_REMOTE_SHELL is a command that reaches 127.0.0.1, .2 and .3, for example ssh (default:
launch/submit/here.sh).
"""

import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.restart.history import read_log
from launch.submit import hosts
from launch.verify.forked_ranks import Ranks
from launch.verify.tiny_runs import trainer
from tests.launch.submit.conftest import ROOT, RealRuns
from train.health.heartbeat import Heartbeat, heartbeat_file, read_record
from train.recipe.exit_status import PREEMPTED_STATUS
from train.recipe.reading import load_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="jobs run the checkout's .venv: missing"),
]

PATIENCE_SECONDS = 600


def start(real_runs: RealRuns, name: str, launcher: str) -> subprocess.Popen[bytes]:
    shell = os.environ.get("FINEGRAIN_REMOTE_SHELL", "bash launch/submit/here.sh")
    job = replace(real_runs.job(name), hosts=("127.0.0.1", "127.0.0.2", "127.0.0.3"), remote_shell=shell)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = hosts.render(job, launcher).replace(f"MASTER_PORT={hosts.MASTER_PORT}", f"MASTER_PORT={port}")
    return subprocess.Popen(["bash", "-c", script])


def reach(real_runs: RealRuns, job: subprocess.Popen[bytes], batch: int) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while len(real_runs.losses("disturbed")) < batch:
        assert job.poll() is None and time.monotonic() < end, f"waited for batch {batch}"
        time.sleep(0.1)


def test_two_hosts_train_what_two_ranks_of_one_machine_train(tmp_path: Path) -> None:
    real_runs = RealRuns(tmp_path, batches=4)
    recipe = load_recipe(ROOT / "yamls/smoke.yaml", list(real_runs.job("forked").overrides))
    with Ranks(2, trainer(recipe), tmp_path / "forked.log") as ranks:
        assert ranks.exit_codes(PATIENCE_SECONDS) == [0, 0]
    assert start(real_runs, "hosts", "torchrun").wait(PATIENCE_SECONDS) == 0
    assert len(real_runs.losses("hosts")) == real_runs.batches
    assert real_runs.losses("hosts") == real_runs.losses("forked")
    (line,) = read_log(tmp_path / "hosts.restarts")
    assert line["kind"] == "finished"


@pytest.mark.skipif(
    "FINEGRAIN_HOSTS" not in os.environ, reason="takes minutes; FINEGRAIN_HOSTS=1 asks for it"
)
def test_a_run_that_loses_a_host_and_is_told_to_end_goes_on_to_the_same_losses(real_runs: RealRuns) -> None:
    assert start(real_runs, "undisturbed", "composer").wait(PATIENCE_SECONDS) == 0
    expected = real_runs.losses("undisturbed")
    assert len(expected) == real_runs.batches

    job = start(real_runs, "disturbed", "torchrun")
    reach(real_runs, job, 6)
    records = real_runs.folder / "disturbed.restarts"
    beat = read_record(heartbeat_file(records, 1), Heartbeat)
    assert beat is not None
    os.kill(beat.pid, signal.SIGKILL)
    reach(real_runs, job, len(real_runs.losses("disturbed")) + 6)
    job.terminate()
    assert job.wait(PATIENCE_SECONDS) == PREEMPTED_STATUS

    assert start(real_runs, "disturbed", "composer").wait(PATIENCE_SECONDS) == 0
    log = read_log(records)
    assert [line["kind"] for line in log] == ["killed", "preempted", "finished"]
    assert [line["excluded"] for line in log] == ["127.0.0.2", None, None]
    assert real_runs.losses("disturbed") == expected
