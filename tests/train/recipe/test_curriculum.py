"""Phases become stages of whole batches; a resumed run keeps its past regardless of the recipe."""

import dataclasses
import json
import math

import numpy as np
import pytest

from data.order.mixture import Mixture
from train.recipe.curriculum import continue_stages, from_json, plan_stages, to_json
from train.recipe.errors import UserError
from train.recipe.phases import phases_of
from train.recipe.schema import Data, Interpolation, Phase, Recipe, Training

S = 32
FIRST = Phase(tokens=3200, weights={"code": 0.5, "prose": 0.5})
RAMP = Phase(tokens=6400, weights={"code": 0.9, "prose": 0.1}, end_weights={"code": 0.2, "prose": 0.8})
LONG = Phase(tokens=5120, weights={"prose": 1.0}, sequence_tokens=4 * S, rope_theta=5e6)


def make(*phases: Phase, batch: int = 8) -> Recipe:
    return Recipe(
        data=Data(shards="x", phases=list(phases), sequence_tokens=S),
        training=Training(
            duration_tokens=sum(p.tokens for p in phases),
            global_batch_sequences=batch,
            microbatch_sequences=2,
        ),
    )


def test_stages_are_the_phases_in_whole_batches():
    curriculum = plan_stages(make(FIRST, RAMP, LONG))
    # 100 samples take 13 batches of 8; the second phase ends once 300 samples are reached.
    assert [(s.first_batch, s.batches, s.first_sample, s.end_sample) for s in curriculum.stages] == [
        (0, 13, 0, 104),
        (13, 25, 104, 304),
        (38, 20, 304, 464),
    ]
    assert [s.rope_theta for s in curriculum.stages] == [500000.0, 500000.0, 5e6]
    assert [s.batch_sequences for s in curriculum.stages] == [8, 8, 2]
    assert curriculum.batches == 58 and curriculum.tokens == 464 * S
    assert [curriculum.stage_of(b).phase for b in (0, 12, 13, 37, 38, 999)] == [0, 0, 1, 1, 2, 2]
    assert curriculum.tokens_after(12) == 104 * S and curriculum.tokens_after(38) == 312 * S
    assert curriculum.batch_at(312) == 39


@pytest.mark.parametrize("interpolation", Interpolation)
def test_a_ramp_follows_its_curve_to_the_sample(interpolation: Interpolation):
    ramp = dataclasses.replace(RAMP, tokens=2000 * S, interpolation=interpolation)
    mixture = Mixture(plan_stages(make(ramp)).segments())
    u = np.arange(1, 2001) / 2000
    way = u * u / 2 if interpolation is Interpolation.linear else u / 2 - np.sin(math.pi * u) / (2 * math.pi)
    wanted = 2000 * (0.9 * (u - way) + 0.2 * way)
    read = np.array([mixture.consumed(n)["code"] for n in range(1, 2001)])
    assert np.abs(read - wanted).max() < 1.1


def test_history_reads_back_and_an_unchanged_recipe_changes_nothing():
    recipe = make(FIRST, RAMP, LONG)
    curriculum = plan_stages(recipe)
    assert from_json(json.loads(json.dumps(to_json(curriculum)))) == curriculum
    for sample in (8, 96, 104, 200, 304, 312, 464):
        assert continue_stages(curriculum, recipe, sample) is curriculum


def test_edits_of_what_is_to_come_are_recorded_and_leave_the_past():
    past = plan_stages(make(FIRST, RAMP))
    cut = dataclasses.replace(RAMP, stop_after_tokens=200 * S - 3200)
    new = Phase(tokens=3200, weights={"code": 0.2, "music": 0.8})
    edited = continue_stages(past, make(FIRST, cut, new), 200)
    assert [(s.phase, s.first_sample, s.end_sample) for s in edited.stages] == [
        (0, 0, 104),
        (1, 104, 200),
        (2, 200, 304),
    ]
    assert edited.edits[0].sample == 200 and edited.edits[0].replaced[0].end_sample == 304
    before, after = Mixture(past.segments()), Mixture(edited.segments())
    for position in range(0, 201, 3):
        was, now = before.consumed(position), after.consumed(position)
        assert was == {name: now[name] for name in was} and now["music"] == 0
    again = continue_stages(edited, make(FIRST, cut, dataclasses.replace(new, tokens=6400)), 240)
    assert again.edits[:1] == edited.edits and len(again.edits) == 2


def test_another_batch_cuts_the_stage_and_keeps_the_books():
    past = plan_stages(make(FIRST, RAMP))
    for sample in (48, 152):
        edited = continue_stages(past, make(FIRST, RAMP, batch=12), sample)
        cut = next(s for s in edited.stages if s.first_sample == sample)
        assert cut.batch_sequences == 12 and cut.first_batch == sample // 8
        assert (cut.ramp_start, cut.ramp_end) == (
            past.stages[cut.phase].ramp_start,
            past.stages[cut.phase].ramp_end,
        )
        before, after = Mixture(past.segments()), Mixture(edited.segments())
        assert all(before.consumed(n) == after.consumed(n) for n in range(sample + 1))


@pytest.mark.parametrize(
    ("phases", "sample", "message"),
    [
        (
            (dataclasses.replace(FIRST, weights={"code": 1.0}), RAMP),
            48,
            r"phases\[0\].weights: is .*1,536 were read",
        ),
        ((dataclasses.replace(FIRST, tokens=640), RAMP), 48, r"phases\[0\]: ends before token 1,536"),
        (
            (dataclasses.replace(FIRST, tokens=6400), RAMP),
            200,
            r"phases\[0\]: no longer ends at token 3,328",
        ),
        (
            (FIRST, dataclasses.replace(RAMP, tokens=9600)),
            200,
            r"phases\[1\].tokens: is 9600, but tokens up to 6,400",
        ),
        ((FIRST, dataclasses.replace(RAMP, sequence_tokens=64)), 200, r"phases\[1\].sequence_tokens: is 64"),
        ((FIRST, dataclasses.replace(RAMP, rope_theta=1e6)), 200, r"phases\[1\].rope_theta"),
        ((FIRST,), 200, r"phases\[1\]: was removed"),
    ],
)
def test_an_edit_that_would_rewrite_the_past_is_refused(phases: tuple[Phase, ...], sample: int, message: str):
    with pytest.raises(UserError, match=message):
        continue_stages(plan_stages(make(FIRST, RAMP)), make(*phases), sample)


def test_the_short_form_is_one_phase():
    data = Data(shards="x", domains={"code": 1.0}, sequence_tokens=S)
    recipe = dataclasses.replace(make(FIRST), data=data)
    (phase,) = phases_of(recipe)
    assert phase.tokens == 3200 and phase.weights == {"code": 1.0} and phase.sequence_tokens == S
