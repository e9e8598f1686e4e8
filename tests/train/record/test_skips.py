"""Excluded ranges: whole batches are skipped, and everything after them keeps its position."""

import dataclasses
from pathlib import Path

import pytest

from train.recipe.curriculum import Curriculum, Skip, from_json, plan_stages, to_json
from train.recipe.errors import UserError
from train.recipe.schema import Data, DataSkip, Phase, Recipe, Training
from train.record.skips import GuardDecision, declared_skips, read_decisions, write_decisions

BATCH = 8
SKIPS = (Skip(43, 50, "b"), Skip(16, 24, "a"), Skip(56, 57, "c"))
"""Of batches of 8 positions: 5 and 6, 2, and 7, which touches the first."""


def staged(*skips: Skip) -> Curriculum:
    """Returns 20 batches of 8 positions, then 20 of 16."""
    phases = [
        Phase(tokens=5120, weights={"a": 1.0}),
        Phase(tokens=10240, weights={"a": 1.0}, global_batch_sequences=16),
    ]
    data = Data(phases=phases, sequence_tokens=32)
    recipe = Recipe(data=data, training=Training(15360, BATCH, 4))
    return dataclasses.replace(plan_stages(recipe), skips=skips)


def test_every_batch_that_holds_a_position_is_left_out() -> None:
    curriculum = staged(*SKIPS, Skip(170, 200, "d"))
    assert curriculum.skipped == ((2, 3), (5, 8), (20, 23))
    assert [curriculum.trained_from(batch) for batch in (1, 2, 6, 8, 20)] == [1, 3, 8, 8, 23]
    assert list(curriculum.trained_before(9)) == [0, 1, 3, 4, 8]
    assert curriculum.skipped_before(6) == [(2, 3), (5, 6)]
    assert curriculum.batches == 40 and curriculum.samples_before(23) == 160 + 3 * 16
    assert from_json(to_json(curriculum)) == curriculum


def test_a_run_ends_where_nothing_is_trained_behind() -> None:
    assert staged(Skip(470, 10_000, "end")).batches == 39
    assert staged(Skip(470, 479, "end")).batches == 39
    assert staged(Skip(440, 464, "before the end")).batches == 40


def test_decisions_read_back_and_follow_the_recipes(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == []
    decision = GuardDecision(80, 96, 11, ["spike: loss 9"], [{"document": "noise.txt"}])
    write_decisions(tmp_path, [decision])
    assert read_decisions(tmp_path) == [decision]
    recipe = Recipe(data=Data(skips=[DataSkip(8, 16)]))
    assert declared_skips(recipe, tmp_path) == (
        Skip(8, 16, "declared by the recipe"),
        Skip(80, 96, "rolled back at step 11: spike: loss 9"),
    )
    (tmp_path / "skips.json").write_text('[{"first_position": 80}]')
    with pytest.raises(UserError, match=r"skips.json can't be read.*restore it"):
        declared_skips(recipe, tmp_path)
