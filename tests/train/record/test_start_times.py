"""The parts of a start add up to it, and are recorded once."""

import json
import time
from pathlib import Path

import pytest

from train.record.start_times import STARTS_FILE, StartClock


def test_the_parts_of_a_start_add_up_to_it(tmp_path: Path) -> None:
    clock, before = StartClock(), time.time()
    clock.write(tmp_path, 0)
    assert not (tmp_path / STARTS_FILE).exists(), "nothing has been measured"
    for part in ("imports", "join", "imports"):
        clock.begin(part)
    clock.write(tmp_path, 4)
    clock.begin("training")
    clock.write(tmp_path, 9)
    (line,) = map(json.loads, (tmp_path / STARTS_FILE).read_text().splitlines())
    assert line["batch"] == 4 and list(line["parts"]) == ["process", "imports", "join"]
    assert line["created"] < before, "this process is older than the test"
    seconds = sum(seconds for seconds, _ in line["parts"].values())
    assert before - 0.01 < line["created"] + seconds < time.time() + 0.01


def test_a_start_that_is_handed_over_began_with_the_other_process(tmp_path: Path) -> None:
    clock, created = StartClock(), time.time() - 100
    clock.begin("imports")
    clock.continue_from(created)
    clock.begin("join")
    clock.write(tmp_path, 0)
    line = json.loads((tmp_path / STARTS_FILE).read_text())
    assert line["created"] == pytest.approx(created, abs=1e-3)
    assert list(line["parts"]) == ["process", "join"] and line["parts"]["process"][0] >= 100
    assert line["parts"]["process"][1] < 100, "the other process's seconds on a core are not this one's"
