import math
import random
from pathlib import Path

import pytest

from train.record.step_log import StepLog, read_steps


def test_one_line_per_step_and_late_fields_join(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    log.write(1, {"a": 1.5})
    log.write(2, {"a": 2.5})
    log.write(2, {"b": [1, 2]})
    assert read_steps(log.path) == [{"step": 1, "a": 1.5}, {"step": 2, "a": 2.5, "b": [1, 2]}]
    assert log.path.read_text().count("\n") == 2


def test_field_that_shrinks_leaves_no_rest(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    log.write(1, {"a": 123456789})
    log.write(1, {"a": 1})
    assert log.path.read_text() == '{"step":1,"a":1}\n'


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    log.write(1, {"a": math.nan, "b": {"c": [math.inf, 1.0]}})
    assert log.path.read_text() == '{"step":1,"a":null,"b":{"c":[null,1.0]}}\n'


def test_steps_never_fall(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    log.write(2, {})
    with pytest.raises(AssertionError):
        log.write(1, {})


def test_file_cut_at_any_byte_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    log = StepLog(whole)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 7})
    content = whole.read_bytes()
    for length in range(len(content) + 1):
        path = tmp_path / f"cut-{length}.jsonl"
        path.write_bytes(content[:length])
        intact = content[:length].count(b"\n")
        cut = StepLog(path)
        assert cut.drop_after(3) == 0
        assert [line["step"] for line in read_steps(path)] == list(range(1, intact + 1))
        cut.write(4, {"loss": 1.0})
        assert [line["step"] for line in read_steps(path)] == [*range(1, intact + 1), 4]
        cut.close()


def test_later_steps_are_dropped(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    for step in range(1, 8):
        log.write(step, {})
    again = StepLog(tmp_path / "log.jsonl")
    assert again.drop_after(5) == 2
    again.write(5, {"late": 1})
    again.write(6, {})
    assert [line["step"] for line in read_steps(log.path)] == [1, 2, 3, 4, 5, 6]
    assert read_steps(log.path)[4] == {"step": 5, "late": 1}


def test_no_file_is_no_steps(tmp_path: Path) -> None:
    assert read_steps(tmp_path / "absent.jsonl") == []


def test_lines_that_a_full_disk_refused_are_written_with_the_next(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = StepLog(tmp_path / "log.jsonl")
    log.write(1, {"a": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        for step in (2, 3):
            with pytest.raises(OSError):
                log.write(step, {"a": step})
        with pytest.raises(OSError):
            log.write(3, {"b": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["step"] for line in read_steps(log.path)] == [1]
    log.write(4, {"a": 4})
    log.write(4, {"b": 4})
    found = [(line["step"], line["a"], line.get("b")) for line in read_steps(log.path)]
    assert found == [(1, 1, None), (2, 2, None), (3, 3, 3), (4, 4, 4)]


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl")
    for step in range(1, 41):
        log.write(step, {"loss": step / 7})
    log.close()
    whole, random_place = log.path.read_bytes(), random.Random(43)
    for _ in range(300):
        place = random_place.randrange(len(whole) - 30)  # A damaged end is a line that was cut off.
        line = whole[:place].count(b"\n") + 1
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random_place.randrange(8)
        log.path.write_bytes(damaged)
        # A damaged line break takes the next line with it.
        lost = {line, line + 1} if whole[place] == ord("\n") else {line}
        found = {fields["step"] for fields in read_steps(log.path)}
        assert found >= set(range(1, 41)) - lost and found <= set(range(1, 41)), (place, found)
        again = StepLog(log.path)
        again.drop_after(35)
        assert {fields["step"] for fields in read_steps(log.path)} >= set(range(1, 36)) - lost
        again.write(36, {"loss": 0.0})
        assert read_steps(log.path)[-1] == {"step": 36, "loss": 0.0}
        again.close()


def test_a_step_that_reads_as_another_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for steps, sound in (
        ([1, 2, 90, 4, 5], [1, 2, 4, 5]),
        ([1, 2, 0, 4, 5], [1, 2, 4, 5]),
        ([9, 2, 3], [2, 3]),
        ([1, 2, 2, 3], [1, 2, 3]),
    ):
        path.write_text("".join(f'{{"step":{step}}}\n' for step in steps))
        assert [fields["step"] for fields in read_steps(path)] == sound
