"""Supervisors of several hosts begin and end every try together; ranks are forked again on all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.experiments.failure_cost import last_step, losses_of, make_recipe, starts_of
from launch.restart import together
from launch.restart.__main__ import main
from launch.restart.history import STOPPED_STATUS, read_log
from launch.restart.together import HostPart, HostsGoneError
from train.checkpoint.files import MANIFEST_FILE
from train.health.heartbeat import Heartbeat, heartbeat_file, read_record
from train.recipe.reading import load_recipe, to_yaml
from train.record.process import HOST_VARIABLE, process_start

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the server needs Linux")]

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_SECONDS = 120.0
FAILED = 1
KILLED = -9
STEPS = 28


def await_that(is_so: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


class Hosts:
    """Supervisors in threads, whose parts of a try end as the test says."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.parts: list[tuple[int, int]] = []
        """Place and node of each part that has begun."""
        self.ends: dict[int, int] = {}
        """The status with which a place's part ends; until there is one it runs."""
        self.said: list[str] = []

    def supervisor(self, place: int, limit: float = PATIENCE_SECONDS) -> HostPart:
        def run(_hosts: tuple[str, ...], node: int, is_over: Callable[[], bool]) -> int:
            self.parts.append((place, node))
            await_that(lambda: is_over() or place in self.ends, 20.0)
            return self.ends.pop(place, KILLED)

        return HostPart(self.folder, place, self.nodes, limit, run, self.said.append)

    @contextmanager
    def following(self, place: int) -> Iterator[list[int]]:
        """A host whose supervisor follows until the job or this context ends; its status is added."""
        supervisor, ended = self.supervisor(place), list[int]()

        def follow() -> None:
            with supervisor.alive():
                ended.append(supervisor.follow())

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield ended
        finally:
            supervisor.is_told_to_end = True
            thread.join()

    def begin(self, *parts: tuple[int, int], then: dict[int, int]) -> threading.Thread:
        """Ends parts once the given ones have begun."""

        def wait() -> None:
            await_that(lambda: set(parts) <= set(self.parts), 20.0)
            self.parts.clear()
            self.ends |= then

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(together, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(together, "LOOK_SECONDS", 0.02)


def test_a_failure_on_one_host_ends_the_try_on_all_and_the_next_begins_on_all(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, 3)
    leader = hosts.supervisor(0)
    with hosts.following(1) as first, hosts.following(2) as second, leader.alive():
        for failing in (2, 0):
            ending = hosts.begin((0, 0), (1, 1), (2, 2), then={failing: FAILED})
            assert leader.lead() == FAILED
            ending.join()
        ending = hosts.begin((0, 0), (1, 1), (2, 2), then={0: 0, 1: 0, 2: 0})
        assert leader.lead() == 0
        ending.join()
        leader.finish(0)
        await_that(lambda: first == second == [0])


def test_a_spare_host_takes_the_place_of_one_that_is_gone(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, 2)
    leader = hosts.supervisor(0)
    with hosts.following(2), leader.alive():
        with hosts.following(1):
            ending = hosts.begin((0, 0), (1, 1), then={1: FAILED})
            assert leader.lead() == FAILED
            ending.join()
        ending = hosts.begin((0, 0), (2, 1), then={0: 0, 2: 0})
        assert leader.lead() == 0
        ending.join()


def test_a_leader_that_is_started_again_leads_again(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, 2)
    with hosts.following(1) as ended:
        for status in (FAILED, 0):
            leader = hosts.supervisor(0)
            with leader.alive():
                ending = hosts.begin((0, 0), (1, 1), then={0: status, 1: status})
                assert leader.lead() == status
                ending.join()
                if status == 0:
                    leader.finish(0)
                    await_that(lambda: ended == [0])


def test_hosts_that_do_not_come_are_named_and_waited_for_up_to_a_limit(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, 3)
    leader = hosts.supervisor(0, limit=1.0)
    with (
        hosts.following(1),
        leader.alive(),
        pytest.raises(HostsGoneError, match="hosts 2 of 3 have not come"),
    ):
        leader.lead()
    assert hosts.said == ["restart: waits for hosts 2, up to 1 s"]
    follower = hosts.supervisor(1, limit=0.5)
    assert follower.follow() == STOPPED_STATUS and "no sign of the first host" in hosts.said[-1]


def test_a_place_needs_warm_and_the_number_of_hosts(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--records", "none", "--place", "0", "--warm", "--", "true"]) == 2
    assert "--place: goes with --warm and --nodes N, without --hosts" in capfd.readouterr().err


class TwoHosts:
    """A run of the tiny recipe on two hosts, which are names on this machine, of two ranks each."""

    def __init__(self, folder: Path, name: str, steps: int) -> None:
        smoke = load_recipe(ROOT / "yamls/smoke.yaml")
        recipe = make_recipe(smoke, folder, name, has_copies=False, steps=steps)
        self.file = folder / f"{name}.yaml"
        self.file.write_text(to_yaml(recipe))
        self.run, self.records = folder / "runs" / name, folder / "runs" / f"{name}.restarts"
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, place: int) -> "subprocess.Popen[bytes]":
        """Starts one host's supervisor."""
        composer = str(Path(sys.executable).parent / "composer")
        words = [sys.executable, "-m", "launch.restart", "--warm", "--nodes", "2", "--place", str(place)]
        words += ["--backoff", "0", "--gather", "300", "--", composer, "-n", "2", "--world_size", "4"]
        words += ["--node_rank", "{node}", "--master_addr", "127.0.0.1", "--master_port", str(self.port)]
        with (self.folder / f"{place}.log").open("ab") as log:
            return subprocess.Popen(
                [*words, "train/main.py", str(self.file)],
                cwd=ROOT,
                env=os.environ | {HOST_VARIABLE: f"n{place}"},
                stdout=log,
                stderr=log,
            )

    def rank(self, rank: int) -> int:
        """A rank's process id."""
        beat = read_record(heartbeat_file(self.records, rank), Heartbeat)
        assert beat is not None
        return beat.pid


def launchers_of(supervisor: "subprocess.Popen[bytes]") -> set[int]:
    """The processes that a supervisor has started and that live: its launcher and the server."""
    text = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text()
    return {int(pid) for pid in text.split() if process_start(int(pid)) is not None}


def weights_of(run: Path) -> dict[str, str]:
    """The digests of weights and optimizer at the end."""
    manifest = json.loads((run / f"checkpoints/batch-{STEPS:08d}" / MANIFEST_FILE).read_text())
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if "/__" in name}
    assert files
    return files


def test_a_run_on_two_hosts_is_the_same_after_a_killed_rank_and_a_killed_supervisor(tmp_path: Path) -> None:
    supervisors: list[subprocess.Popen[bytes]] = []
    try:
        whole = TwoHosts(tmp_path, "whole", steps=STEPS)
        supervisors = [whole.start(0), whole.start(1)]
        assert [each.wait(2 * PATIENCE_SECONDS) for each in supervisors] == [0, 0]

        broken = TwoHosts(tmp_path, "broken", steps=STEPS)
        supervisors = [broken.start(0), broken.start(1)]
        await_that(lambda: last_step(broken.run) >= 10)
        before = [launchers_of(each) for each in supervisors]
        os.kill(broken.rank(3), signal.SIGKILL)
        await_that(lambda: len(starts_of(broken.run)) == 2)
        assert [launchers_of(each) for each in supervisors] == before, "nothing was started"
        starts = starts_of(broken.run)
        assert "imports" not in starts[1]["parts"] or starts[1]["parts"]["imports"][0] < 0.1

        await_that(lambda: last_step(broken.run) >= 18)
        supervisors[1].kill()
        supervisors[1].wait()
        supervisors[1] = broken.start(1)
        assert [each.wait(2 * PATIENCE_SECONDS) for each in supervisors] == [0, 0]
    finally:
        for each in supervisors:
            each.kill()
            each.wait()
    assert [line["kind"] for line in read_log(broken.records)] == ["killed", "killed", "finished"]
    assert losses_of(broken.run) == losses_of(whole.run) and len(losses_of(whole.run)) == STEPS
    assert weights_of(broken.run) == weights_of(whole.run)
