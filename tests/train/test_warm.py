"""Ranks forked by a server that has imported: they have the place of the processes that hand over to it."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from train.record.process import process_start
from train.warm import WARM_VARIABLE, WarmServer, _stand_in, hand_over

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the server needs Linux")]

FORK = multiprocessing.get_context("fork")
COLD = 99
"""Status of a process that is to run its rank itself."""
PATIENCE_SECONDS = 20.0


def import_code() -> bool:
    """Imports what ranks run."""
    return importlib.import_module("warm_code") is not None


def rank(arguments: Sequence[str]) -> int:
    """Does what its first argument says."""
    print(*arguments, os.environ["RANK"], Path.cwd().name, os.environ.get(WARM_VARIABLE, "none"), flush=True)
    match arguments[0]:
        case "fails":
            raise ValueError("no")
        case "exits":
            sys.exit(77)
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "waits":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            Path("pid").write_text(str(os.getpid()))
            time.sleep(PATIENCE_SECONDS)
    return 0


class Host:
    """A server, and the other processes that a launcher starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "output"
        self.socket = folder / "s"
        (folder / "warm_code.py").write_text("ANSWER = 42\n")
        life, self.life = (each.detach() for each in socket.socketpair())

        def serve() -> None:
            os.close(self.life)
            # In place of pytest's, which write elsewhere.
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.path.insert(0, str(folder))
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self.socket))
                listener.listen()
                sys.exit(WarmServer(listener, import_code, rank, life, root=folder).serve())

        self.server = FORK.Process(target=serve)
        self.server.start()
        os.close(life)
        await_that(self.socket.exists)

    def start(self, word: str, number: int = 0, **variables: str) -> BaseProcess:
        """Starts a process that hands itself over."""

        def stand() -> None:
            os.close(self.life)
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(self.folder)
            os.environ |= {WARM_VARIABLE: str(self.socket), "RANK": str(number), **variables}
            status = hand_over([str(self.folder / "main.py"), word])
            sys.exit(COLD if status is None else status)

        process = FORK.Process(target=stand)
        process.start()
        return process

    def status(self, word: str, number: int = 0, **variables: str) -> int | None:
        """The exit status of a process that hands itself over."""
        process = self.start(word, number, **variables)
        process.join(PATIENCE_SECONDS)
        return process.exitcode

    def waiting(self) -> tuple[BaseProcess, int]:
        """A process whose rank waits, and the rank's process id."""
        file = self.folder / "pid"
        file.unlink(missing_ok=True)
        process = self.start("waits")
        await_that(lambda: file.exists() and file.read_text() != "")
        return process, int(file.read_text())


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    yield found
    os.close(found.life)
    found.server.join(PATIENCE_SECONDS)
    assert found.server.exitcode == 0


def await_that(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_has_the_place_of_the_process_that_handed_it_over(host: Host) -> None:
    assert host.status("works", 3, MASTER_PORT="29501") == 0
    assert host.output.read_text() == f"works 3 {host.folder.name} none\n"
    assert host.status("works", 4, MASTER_PORT="29502") == 0
    assert host.status("fails") == 1 and "ValueError: no" in host.output.read_text()
    assert host.status("exits") == 77
    assert host.status("dies") == -signal.SIGKILL


def test_neither_of_the_two_outlives_the_other(host: Host) -> None:
    process, pid = host.waiting()
    process.terminate()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 75 and process_start(pid) is None
    process, pid = host.waiting()
    process.kill()
    await_that(lambda: process_start(pid) is None)
    process, pid = host.waiting()
    os.kill(pid, signal.SIGKILL)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert host.status("works") == 0, "the server still serves"


def test_ranks_that_would_import_something_else_do_it_themselves(host: Host) -> None:
    assert host.status("works", OMP_NUM_THREADS="1") == 0
    assert host.status("works", OMP_NUM_THREADS="2") == COLD
    assert host.status("works", OMP_NUM_THREADS="1", PYTHONPATH="/elsewhere") == COLD
    code = host.folder / "warm_code.py"
    os.utime(code, (0, 0))
    assert host.status("works", OMP_NUM_THREADS="1") == COLD


def test_without_a_server_a_rank_runs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WARM_VARIABLE, raising=False)
    assert hand_over(["main.py"]) is None
    monkeypatch.setenv(WARM_VARIABLE, str(tmp_path / "gone"))
    assert hand_over(["main.py"]) is None


def heard(host: Host, count: int) -> list[str]:
    """Waits for lines of the server."""
    text = ""
    while text.count("\n") < count:
        text += os.read(host.life, 1).decode()
    return text.splitlines()


def test_ranks_of_a_whole_job_are_forked_again_behind_the_launchers_back(host: Host) -> None:
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    waits = host.start("waits", 0, **size)
    pid_file = host.folder / "pid"
    await_that(lambda: pid_file.exists() and pid_file.read_text() != "")
    first = int(pid_file.read_text())
    dies = host.start("dies", 1, **size)
    (ended,) = heard(host, 1)
    assert ended.startswith("ended ") and ended.endswith(" -9")
    os.write(host.life, b"again\n")
    assert heard(host, 1) == ["cold"], "a rank still lives"
    os.write(host.life, b"kill\n")
    assert heard(host, 1) == [f"ended {first} -9"]
    assert waits.is_alive() and dies.is_alive()

    pid_file.unlink()
    os.write(host.life, b"again\n")
    begun, ended = heard(host, 2)
    assert begun == "begun" and ended.endswith(" -9")
    await_that(lambda: pid_file.exists() and pid_file.read_text() != "")
    assert int(pid_file.read_text()) != first
    os.write(host.life, b"kill\n")
    heard(host, 1)
    # Of changed code none is forked again; the launcher, and its processes with it, is ended then.
    os.utime(host.folder / "warm_code.py", (0, 0))
    os.write(host.life, b"again\n")
    assert heard(host, 1) == ["cold"]
    for process in (waits, dies):
        process.terminate()
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == -signal.SIGTERM


def test_a_signal_that_comes_as_a_rank_has_ended_is_not_lost() -> None:
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()

    def next_answer() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "rank 0\n"

    process = FORK.Process(target=_stand_in, args=(f"rank {ended.pid}", next_answer))
    process.start()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == -signal.SIGTERM


def test_a_rank_that_ends_for_good_is_not_kept(host: Host) -> None:
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    waits = host.start("waits", 0, **size)
    await_that((host.folder / "pid").exists)
    assert host.status("works", 1, **size) == 0
    waits.terminate()
    waits.join(PATIENCE_SECONDS)
    assert waits.exitcode == 75


def test_ranks_end_with_their_server(host: Host) -> None:
    process, pid = host.waiting()
    os.close(host.life)
    process.join(PATIENCE_SECONDS)
    await_that(lambda: process_start(pid) is None)
    assert process.exitcode == -signal.SIGKILL
    host.life = os.open(os.devnull, os.O_RDONLY)
