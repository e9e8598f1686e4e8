"""A rollback's excluded range follows from the alarm, the recipe and the existing checkpoints."""

import dataclasses
from pathlib import Path

import pytest

from tests.train.start.test_resume import RECIPE, save
from train.recipe.curriculum import plan_stages
from train.recipe.reliability import Guard
from train.recipe.topology import Topology
from train.record.skips import names_of, read_decisions
from train.step.rollback import Rollback

GUARD = Guard(rollback_before_batches=4, rollback_after_batches=2, most_rollbacks=2)


def rollback(folder: Path, waited: list[str]) -> Rollback:
    return Rollback(folder, GUARD, plan_stages(RECIPE), Topology(), lambda: waited.append("waited"))


def test_the_range_reaches_as_far_back_as_checkpoints_do(tmp_path: Path) -> None:
    waited: list[str] = []
    decide = rollback(tmp_path, waited).decide
    first = decide(20, 1, ["spike"], [{"document": "a"}])
    assert first is not None and (first.first_position, first.end_position) == (16 * 8, 23 * 8)
    save(tmp_path, 18)
    save(tmp_path, 24)
    second = decide(30, 10, ["collapsed"], [])
    # 21 - 4 = 17 is before the oldest checkpoint.
    assert second is not None and (second.first_position, second.end_position) == (18 * 8, 33 * 8)
    assert read_decisions(tmp_path) == [first, second] and waited == ["waited"] * 2
    assert decide(35, 1, ["spike"], []) is None
    assert read_decisions(tmp_path) == [first, second]


def test_a_record_that_cannot_be_written_is_no_decision(tmp_path: Path) -> None:
    gone = dataclasses.replace(rollback(tmp_path, []), folder=tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):
        gone.decide(20, 1, ["spike"], [])


def test_documents_are_named_by_their_tokens() -> None:
    pieces = [{"domain": "code", "document": name, "tokens": n} for name, n in (("a", 3), ("b", 9), ("a", 7))]
    assert names_of([*pieces, {"error": "shard gone"}], most=1) == "code: a and 1 more"
