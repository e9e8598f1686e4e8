"""Jobs on hosts: the real scripts that start, stop and replace them, with only the launchers faked."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.restart.history import STOPPED_STATUS, read_log
from launch.submit import hosts
from launch.submit.job import Device, Job
from train.health.heartbeat import FINDING_FILE, Finding, Suspect
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, USAGE_STATUS

ROOT = Path(__file__).resolve().parents[3]
JOB = Job(
    str(ROOT / "yamls/dbrx-moe-a.yaml"),
    overrides=("training.clip_norm=0.5", "start.weights=/data/it's here/$HOME"),
    environment={"SITE": 'it\'s "quoted" $here'},
)


def wait_for_words(file: Path, word: str, count: int) -> None:
    """Waits until a file contains a word a given number of times."""
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text().count(word) == count):
        assert time.monotonic() < end, f"waited for {count} times {word!r} in {file}"
        time.sleep(0.1)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with fake launchers and a fake train/main.py that print their arguments."""
    folder = tmp_path / "a checkout"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "launch").mkdir()
    shutil.copytree(ROOT / "launch/submit", folder / "launch/submit")
    rank = 'trap "sleep 1; echo saved >>log; exit 75" TERM; echo ready >>log; while :; do sleep 0.1; done'
    for name in ("composer", "torchrun"):
        launcher = folder / ".venv/bin" / name
        # Like the real ones: they do not pass SIGTERM on, and torchrun exits only with 1.
        lost = "1" if name == "torchrun" else "$?"
        launcher.write_text(
            '#!/bin/bash\nprintf "%s\\n" "$@" >args\n'
            '[ -n "$FAIL" ] && exit $FAIL\n[ -z "$RANK" ] || exit 9\n'
            f"bash -c '{rank}' &\nwait $!; [ $? -eq 0 ] || exit {lost}\n"
        )
        launcher.chmod(0o755)
    return folder


@pytest.mark.parametrize("launcher", ["composer", "torchrun"])
def test_node_passes_sigterm_to_the_ranks_and_ends_with_75(checkout: Path, launcher: str) -> None:
    variables = {
        "NODES": "3",
        "NODE_RANK": "2",
        "RANKS_PER_NODE": "4",
        "MASTER_ADDR": "h0",
        "MASTER_PORT": "29500",
        "LAUNCHER": launcher,
        "RANK": "17",  # set by a scheduler; must not reach the launcher
        "FAIL": "",
    }
    command = ["bash", str(checkout / "launch/submit/node.sh"), "yamls/x.yaml", "a=it's $b"]
    process = subprocess.Popen(command, env=os.environ | variables)
    log = checkout / "log"
    wait_for_words(log, "ready", 1)
    process.terminate()
    assert process.wait(20) == PREEMPTED_STATUS
    assert log.read_text() == "ready\nsaved\n"
    words = (checkout / "args").read_text().splitlines()
    assert words[-3:] == ["train/main.py", "yamls/x.yaml", "a=it's $b"]
    assert words[words.index("--node_rank" if launcher == "composer" else "--node-rank") + 1] == "2"
    if launcher == "composer":
        assert words[words.index("--world_size") + 1] == "12" and words[words.index("--base_rank") + 1] == "8"
    failed = subprocess.run(command, env=os.environ | variables | {"FAIL": "2"}, check=False)
    assert failed.returncode == USAGE_STATUS


@pytest.fixture
def by_ssh(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the command of a try on two hosts, with ssh running everything on this machine."""
    ssh = checkout / "bin/ssh"
    ssh.parent.mkdir()
    # Like the real one: no variable is passed on, and its children survive it.
    ssh.write_text(
        '#!/bin/bash\nwhile [ "$1" = -o ]; do shift 2; done\n'
        'setsid env -i PATH="$PATH" HOME="$HOME" bash -c "$2" &\nwait $!\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    variables = {
        "RANKS_PER_NODE": "1",
        "MASTER_PORT": "29517",
        "LAUNCHER": "composer",
        "SAVE_SECONDS": "60",
        "REMOTE_SHELL": JOB.remote_shell,
        "WORKDIR": str(checkout),
        "VARIABLES": "A='b c'",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return ["bash", str(ROOT / "launch/submit/ssh_step.sh"), "h0,h1", "yamls/x.yaml", "a=it's $b"]


def test_sigterm_reaches_the_ranks_of_every_host(checkout: Path, by_ssh: list[str]) -> None:
    process = subprocess.Popen(by_ssh)
    log = checkout / "log"
    wait_for_words(log, "ready", 2)
    process.terminate()
    assert process.wait(20) == PREEMPTED_STATUS
    assert log.read_text().count("saved") == 2
    assert (checkout / "args").read_text().splitlines()[-2:] == ["yamls/x.yaml", "a=it's $b"]


@pytest.fixture
def on_this_machine(checkout: Path) -> Job:
    """A job on two hosts and a spare one, all of them this machine, with this Python."""
    python = checkout / ".venv/bin/python"
    python.write_text(f'#!/bin/bash\nPYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return replace(
        JOB,
        nodes=2,
        gpus_per_node=1,
        device=Device.cpu,
        hosts=("127.0.0.1", "127.0.0.2", "127.0.0.3"),
        workdir=str(checkout),
        remote_shell="bash launch/submit/here.sh",
        interface="lo",
    )


def script_of(job: Job, launcher: str) -> str:
    """Returns the rendered script, without waits between tries."""
    return hosts.render(job, launcher).replace("launch.restart", "launch.restart --backoff 0")


@pytest.mark.parametrize("launcher", ["composer", "torchrun"])
def test_a_host_that_hangs_is_replaced_by_the_spare_one(
    checkout: Path, on_this_machine: Job, launcher: str
) -> None:
    """Script, supervisor and steps are real; the launcher is fake."""
    stand_in = checkout / ".venv/bin" / launcher
    finding = asdict(Finding(0.0, 4, 9.0, "", [], [Suspect(1, "$FINEGRAIN_HOST", "is stopped")]))
    stand_in.write_text(
        "#!/bin/bash\n"
        'words="$MASTER_ADDR $NODES $NODE_RANK $GLOO_SOCKET_IFNAME $SITE ${*: -3}"\n'
        'echo "$words" >>"said by $FINEGRAIN_HOST"\n'
        '[ "$FINEGRAIN_HOST" != 127.0.0.2 ] && exit 0\n'
        # The watchdog's finding, where the supervisor looks for it.
        f'cat >"$FINEGRAIN_RECORDS/{FINDING_FILE}" <<END\n{json.dumps(finding)}\nEND\n'
        f"exit {HANG_STATUS}\n"
    )
    script = script_of(on_this_machine, launcher)
    ended = subprocess.run(["bash", "-c", script], check=False, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 on 127.0.0.2 is stopped; 127.0.0.2 is excluded from now on" in ended.stderr
    words = f"127.0.0.1 2 {{}} lo {JOB.environment['SITE']} {' '.join(JOB.arguments)}\n"
    said = {host: (checkout / f"said by {host}").read_text() for host in on_this_machine.hosts}
    first, second = words.format(0), words.format(1)
    assert said == {"127.0.0.1": 2 * first, "127.0.0.2": second, "127.0.0.3": second}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_told_to_end_waits_until_every_host_has_saved(
    checkout: Path, on_this_machine: Job, by_ssh: list[str], number: int
) -> None:
    script = script_of(replace(on_this_machine, remote_shell=JOB.remote_shell), "composer")
    process = subprocess.Popen(["bash", "-c", script])
    wait_for_words(checkout / "log", "ready", 2)
    process.send_signal(number)
    assert process.wait(60) == PREEMPTED_STATUS
    assert (checkout / "log").read_text().count("saved") == 2


NODE = {
    "NODES": "1",
    "NODE_RANK": "0",
    "RANKS_PER_NODE": "1",
    "MASTER_ADDR": "h0",
    "MASTER_PORT": "29500",
    "LAUNCHER": "composer",
}


def test_what_has_not_ended_after_sigterm_is_killed_and_not_called_saved(checkout: Path) -> None:
    launcher = checkout / ".venv/bin/composer"
    launcher.write_text("#!/bin/bash\nbash -c 'echo $$ >pid; echo ready >>log; kill -STOP $$' &\nwait $!\n")
    node = ["bash", str(checkout / "launch/submit/node.sh"), "yamls/x.yaml"]
    process = subprocess.Popen(node, env=os.environ | NODE | {"SAVE_SECONDS": "1"})
    wait_for_words(checkout / "log", "ready", 1)
    process.terminate()
    assert process.wait(30) not in (0, PREEMPTED_STATUS)
    stopped = Path("/proc", (checkout / "pid").read_text().strip())
    deadline = time.monotonic() + 30
    while stopped.exists():  # Killed, but perhaps not yet reaped.
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_try_whose_connection_was_lost_is_ended_by_the_next(checkout: Path) -> None:
    node = ["bash", str(checkout / "launch/submit/node.sh"), "yamls/x.yaml"]
    environment = os.environ | NODE | {"PID_FILE": str(checkout / "node.pid")}
    lost = subprocess.Popen(node, env=environment)
    wait_for_words(checkout / "log", "ready", 1)
    launcher = checkout / ".venv/bin/composer"
    launcher.write_text("#!/bin/bash\npgrep -P $LOST_LAUNCHER >left; exit 0\n")
    (running,) = subprocess.check_output(["pgrep", "-P", str(lost.pid)], text=True).split()
    ended = subprocess.run(node, env=environment | {"LOST_LAUNCHER": running}, check=False, timeout=30)
    assert ended.returncode == 0
    assert lost.wait(10) == -signal.SIGKILL
    assert (checkout / "left").read_text() == "", "a rank of the lost try still runs"


def test_the_first_node_stops_a_job_that_a_system_would_restart_for_ever(
    checkout: Path, on_this_machine: Job
) -> None:
    assert on_this_machine.workdir == str(checkout), "its Python is needed"
    script = checkout / "launch/submit/node.sh"
    script.write_text(script.read_text().replace("--look-back", "--look-back --backoff 0"))
    launcher = checkout / ".venv/bin/composer"
    launcher.write_text("#!/bin/bash\necho started >>log; exit 1\n")
    records = {"LOOK_BACK": "yes", "FINEGRAIN_RECORDS": "runs/x.restarts"}

    def start(rank: int) -> int:
        environment = os.environ | NODE | records | {"NODE_RANK": str(rank)}
        return subprocess.run(["bash", str(script), "x.yaml"], env=environment, check=False).returncode

    assert [start(0) for _ in range(4)] == [1, 1, 1, STOPPED_STATUS]
    assert (checkout / "log").read_text().count("started") == 3
    assert [line["kind"] for line in read_log(checkout / "runs/x.restarts")] == 3 * ["unknown"]
    assert start(1) == 1, "the others wait for the first node, which decides"


def test_a_host_that_cannot_be_reached_is_replaced_by_the_spare_one(
    checkout: Path, on_this_machine: Job, by_ssh: list[str]
) -> None:
    ssh = checkout / "bin/ssh"
    ssh.write_text(ssh.read_text().replace("setsid", '[ "$1" = 127.0.0.1 ] && exit 255\nsetsid'))
    script = script_of(replace(on_this_machine, remote_shell=JOB.remote_shell), "composer")
    (checkout / ".venv/bin/composer").write_text('#!/bin/bash\nsleep 1\necho "$MASTER_ADDR" >>log\n')
    ended = subprocess.run(["bash", "-c", script], check=False, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "the connection to 127.0.0.1 was lost or never came about; 127.0.0.1 is excluded" in ended.stderr
    assert (checkout / "log").read_text().endswith("127.0.0.2\n127.0.0.2\n")


def test_a_host_that_fails_ends_the_others_and_gives_its_status(checkout: Path, by_ssh: list[str]) -> None:
    launcher = checkout / ".venv/bin/composer"
    fails = 'case "$*" in *"--node_rank 1"*) sleep 1; exit 76 ;; esac'
    launcher.write_text(launcher.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{fails}\n"))
    assert subprocess.run(by_ssh, check=False, timeout=30).returncode == HANG_STATUS
    assert (checkout / "log").read_text().count("saved") == 1
