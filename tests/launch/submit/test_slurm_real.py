"""The rendered script on a real SLURM: slurmctld and several slurmd on loopback, ranks on CPUs.

Needs Debian's slurm-wlm and munge, root, and FINEGRAIN_SLURM=1; otherwise skipped with the reason. A run
stopped by SIGTERM saves and is requeued; the first killed node is replaced by the spare one, the next by
requeueing; the losses equal those of an undisturbed run.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.submit import slurm
from launch.submit.job import Job
from tests.launch.submit.conftest import RealRuns

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
NODES = ("n1", "n2", "n3", "n4", "n5")
FIRST_PORT = 17010
PATIENCE_SECONDS = 240

ASKED = "FINEGRAIN_SLURM" in os.environ
"""Five starts of a job and SLURM's own waits take minutes: not in every test run."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ASKED, reason="takes minutes; FINEGRAIN_SLURM=1 asks for it"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]

CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
ReturnToService=0
SchedulerParameters=sched_interval=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A SLURM on this machine only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        nodes = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
            f"Port={FIRST_PORT + number} CPUs=2"
            for number, node in enumerate(NODES, 1)
        ]
        conf = folder / "slurm.conf"
        conf.write_text(
            CONF.format(host=socket.gethostname(), port=FIRST_PORT, folder=folder, nodes="\n".join(nodes))
        )
        self.environment = os.environ | {"SLURM_CONF": str(conf)}

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        munge = [f"--{kind}={self.folder}/munge.{kind}" for kind in ("socket", "pid-file", "log-file")]
        seed = f"--seed-file={self.folder}/munge.seed"
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", seed, *munge)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, name=node)
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%T").stdout.strip() == "idle", "idle nodes")

    def _daemon(self, *command: str, name: str = "") -> None:
        name = name or command[0]
        with (self.folder / f"{name}.out").open("wb") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder
            )

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def submit(self, job: Job) -> str:
        script = self.folder / f"{job.name}.sbatch"
        script.write_text(slurm.render(job))
        sent = self.call("sbatch", "--parsable", f"--chdir={self.folder}", str(script))
        assert sent.returncode == 0, sent.stderr
        return sent.stdout.strip()

    def of_job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "--oneliner", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def kill_node(self, node: str) -> None:
        """Kills a node's daemon, its job steps and all their descendants at once."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for pid in processes_with(f"SLURMD_NODENAME={node}"):
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.call("scancel", "--user=root")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in processes_with(f"SLURM_CONF={self.environment['SLURM_CONF']}"):
            os.kill(pid, signal.SIGKILL)


def processes_with(variable: str) -> list[int]:
    """Returns other processes that have a variable with this value in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.3)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_a_run_that_is_preempted_and_loses_nodes_ends_with_the_same_losses(
    cluster: Cluster, real_runs: RealRuns
) -> None:
    folder, losses = real_runs.folder, real_runs.losses
    undisturbed = cluster.submit(real_runs.job("undisturbed"))
    wait_for(lambda: cluster.of_job(undisturbed).get("JobState") == "COMPLETED", "the undisturbed run")
    expected = losses("undisturbed")
    assert len(expected) == real_runs.batches

    disturbed = cluster.submit(real_runs.job("disturbed"))
    wait_for(lambda: len(losses("disturbed")) >= 5, "batch 5")
    # The signal that SLURM sends before the time limit.
    cluster.call("scancel", "--batch", "--signal=TERM", disturbed)
    wait_for(lambda: cluster.of_job(disturbed).get("Restarts") == "1", "a requeue after SIGTERM")
    after_signal = max(losses("disturbed"))
    assert after_signal < real_runs.batches
    assert (folder / "disturbed/checkpoints" / f"batch-{after_signal:08d}").is_dir()

    reach(real_runs, after_signal + 5)
    assert cluster.of_job(disturbed)["NodeList"] == "n[1-3]"
    cluster.kill_node("n2")
    reach(real_runs, max(losses("disturbed")) + 5)
    # The spare node took its place, in the same allocation.
    assert cluster.of_job(disturbed)["Restarts"] == "1"
    assert "n2 is excluded" in (folder / f"disturbed-{disturbed}.log").read_text()

    cluster.kill_node("n3")
    wait_for(lambda: cluster.of_job(disturbed).get("Restarts") == "2", "a requeue without spare nodes")
    wait_for(lambda: cluster.of_job(disturbed).get("JobState") == "COMPLETED", "the end")
    assert cluster.of_job(disturbed)["NodeList"] == "n[1,4-5]"
    assert losses("disturbed") == expected


def reach(real_runs: RealRuns, batch: int) -> None:
    wait_for(lambda: max(real_runs.losses("disturbed")) >= batch, f"batch {batch}")
