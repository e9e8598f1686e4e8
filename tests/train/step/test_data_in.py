"""The clock skips excluded batches, and the learning rate depends on a batch's place in the run."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from composer import Timestamp

from tests.train.start.test_resume import RECIPE
from train.recipe.curriculum import Curriculum, Skip, plan_stages
from train.recipe.schema import Data, Optimizer, Phase, Schedule
from train.step.data_in import learning_rate, skip_excluded

BATCH = RECIPE.training.global_batch_sequences


def excluding(*batches: tuple[int, int]) -> Curriculum:
    skips = tuple(Skip(first * BATCH, after * BATCH, "") for first, after in batches)
    return dataclasses.replace(plan_stages(RECIPE), skips=skips)


def at(batch: int) -> Any:
    return SimpleNamespace(timestamp=Timestamp(batch=batch, sample=batch * BATCH))


def test_the_clock_counts_what_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    state, curriculum = at(2), excluding((2, 5))
    skip_excluded(state, curriculum, is_main=True)
    stamp, samples = state.timestamp, 5 * BATCH
    assert (stamp.batch, stamp.batch_in_epoch) == (5, 5)
    assert (stamp.sample, stamp.sample_in_epoch) == (samples, samples)
    assert (stamp.token, stamp.token_in_epoch) == (samples * curriculum.sample_tokens,) * 2
    assert f"batches 3 to 5 (positions {2 * BATCH} to {samples - 1})" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 5])
def test_the_clock_stays_at_a_batch_that_is_trained(batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    state = at(batch)
    before = state.timestamp
    skip_excluded(state, excluding((2, 5)), is_main=True)
    assert state.timestamp is before and not capsys.readouterr().err


def test_one_rank_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    state = at(2)
    skip_excluded(state, excluding((2, 5)), is_main=False)
    assert state.timestamp.batch == 5 and not capsys.readouterr().err


def test_the_rate_is_that_of_the_batchs_end_and_phase() -> None:
    phases = [
        Phase(tokens=1024, weights={"a": 1.0}),
        Phase(tokens=1024, weights={"a": 1.0}, learning_rate_scale=0.5),
    ]
    recipe = dataclasses.replace(
        RECIPE,
        data=Data(phases=phases, sequence_tokens=32),
        optimizer=Optimizer(learning_rate=0.8),
        schedule=Schedule(warmup_tokens=1536),
    )
    tokens, curriculum = BATCH * 32, plan_stages(recipe)
    first = 1024 // tokens
    assert learning_rate(recipe, curriculum, 0) == pytest.approx(0.8 * tokens / 1536)
    assert learning_rate(recipe, curriculum, first) == pytest.approx(0.5 * 0.8 * (1024 + tokens) / 1536)
