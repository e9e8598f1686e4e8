"""A folder has one holder: the second is refused while the first lives, and takes over a dead one's lease."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from train.recipe.errors import UserError
from train.record import lease
from train.record.lease import LEASE_FOLDER, Holder, hold, release
from train.record.process import host_name, pid_space, process_start

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from train.recipe.errors import UserError
from train.record.lease import hold
try:
    seconds = {"grace_seconds": 0.1, "expiry_seconds": 1.0, "renewal_seconds": 0.05}
    hold(Path(sys.argv[1]), key="name", remedy="wait", **seconds)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
print("holds", flush=True)
time.sleep(60)
"""


@contextmanager
def process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder, or says why not."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def take(folder: Path, expiry_seconds: float = 0.4) -> None:
    hold(folder, key="name", remedy="wait", grace_seconds=0.1, expiry_seconds=expiry_seconds)


def elsewhere(folder: Path, number: int = 1, **fields: object) -> Path:
    """Writes the lease of a process on another host."""
    file = folder / LEASE_FOLDER / f"{number:06d}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = asdict(Holder("n7", 41, "another boot", 9, "2026-11-28 16:00:00 UTC", "cafe")) | fields
    file.write_text(json.dumps(tree))
    return file


@pytest.mark.slow
def test_a_second_process_is_refused_and_takes_over_a_dead_one(tmp_path: Path) -> None:
    with process(tmp_path / "run") as first:
        assert said(first) == "holds"
        with process(tmp_path / "run") as second:
            line = said(second)
            assert line.startswith(
                f"name: {tmp_path}/run is in use by process {first.pid} on {host_name()} since "
            )
            assert line.endswith("; wait") and second.wait() == 2
        # A stopped process may continue at any moment.
        first.send_signal(signal.SIGSTOP)
        with process(tmp_path / "run") as second:
            assert f"process {first.pid}" in said(second)
        first.send_signal(signal.SIGKILL)
        # Not collected yet by its parent: it is dead all the same.
        begun = time.monotonic()
        take(tmp_path / "run")
        assert time.monotonic() - begun < 0.4
    release(tmp_path / "run")


def test_a_reused_process_id_is_no_holder(tmp_path: Path) -> None:
    elsewhere(tmp_path, host=host_name(), pid=os.getppid(), pid_space=pid_space(), started=1)
    assert process_start(os.getppid()) not in (None, 1)
    take(tmp_path)
    release(tmp_path)


def test_who_renews_on_another_host_lives_and_who_is_silent_is_dead(tmp_path: Path) -> None:
    file, done = elsewhere(tmp_path), threading.Event()

    def renew() -> None:
        count = 0
        while not done.wait(0.05):
            count += 1
            elsewhere(tmp_path, count=count)

    renewing = threading.Thread(target=renew)
    renewing.start()
    with pytest.raises(UserError, match=r"in use by process 41 on n7 since 2026-11-28 16:00:00 UTC; wait"):
        take(tmp_path)
    done.set()
    renewing.join()
    take(tmp_path)
    assert not file.exists() and [path.name for path in file.parent.iterdir()] == ["000002.json"]
    release(tmp_path)


@pytest.mark.slow
def test_an_ended_lease_is_followed_at_once(tmp_path: Path) -> None:
    take(tmp_path)
    take(tmp_path)  # This very process.
    release(tmp_path)
    assert json.loads((tmp_path / LEASE_FOLDER / "000001.json").read_bytes())["has_ended"]
    begun = time.monotonic()
    with process(tmp_path) as other:
        assert said(other) == "holds"
    elsewhere(tmp_path, 9, has_ended=True)
    take(tmp_path, expiry_seconds=60)
    assert time.monotonic() - begun < 30
    release(tmp_path)


@pytest.mark.slow
def test_of_several_that_take_a_dead_lease_over_one_gets_it(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    commands = [[sys.executable, "-c", HOLD, str(tmp_path)]] * 4
    running = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for words in commands]
    try:
        lines = sorted(said(each) for each in running)
        assert lines[0] == "holds" and all("is in use by" in line for line in lines[1:]), lines
    finally:
        for each in running:
            each.kill()
            each.communicate()


@pytest.mark.slow
def test_a_holder_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    with process(tmp_path) as first:
        assert said(first) == "holds"
        elsewhere(tmp_path, 2)
        assert first.wait(timeout=20) == 2
    assert json.loads((tmp_path / LEASE_FOLDER / "000002.json").read_bytes())["host"] == "n7"


def test_a_damaged_record_is_waited_for_and_ends_no_holder(tmp_path: Path) -> None:
    whole, random_place = elsewhere(tmp_path).read_bytes(), random.Random(1)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[random_place.randrange(len(whole))] ^= 1 << random_place.randrange(8)
        found = lease._parse(bytes(damaged))
        assert found is None or isinstance(found, Holder)
    for content in (b"", b"\0" * 512, b"[]", b"\xff"):
        elsewhere(tmp_path).write_bytes(content)
        begun = time.monotonic()
        take(tmp_path, expiry_seconds=0.2)
        assert time.monotonic() - begun >= 0.2
        release(tmp_path)
        for file in (tmp_path / LEASE_FOLDER).iterdir():
            file.unlink()
    take(tmp_path)
    mine = next((tmp_path / LEASE_FOLDER).iterdir())
    held = lease._held[tmp_path.resolve()][1]
    mine.write_bytes(mine.read_bytes().replace(held.holder.token.encode(), b"0" * 16))
    assert not held.is_lost()
    release(tmp_path)
