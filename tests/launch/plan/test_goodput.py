"""The closed form of goodput against a simulated run with failures; the best interval against all others."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan.goodput import PUBLISHED_FAILURES, Goodput, goodput
from launch.plan.hardware import gpu_named
from launch.plan.step import make_plan
from train.recipe.reading import load_recipe

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
RUN = Goodput(
    failures_per_hour=0.5, restart_seconds=300, save_seconds=8, interval_seconds=900, recheck_share=0.02
)


def simulated(run: Goodput, hours: float, seed: int) -> float:
    """Goodput of a run of steps, saves and failures at random moments, second by second."""
    chance, rate = random.Random(seed), run.failures_per_hour / 3600
    now, done, saved, until_save = 0.0, 0.0, 0.0, run.interval_seconds
    failure = chance.expovariate(rate)
    while now < hours * 3600:
        work = until_save * (1 + run.recheck_share) + run.save_seconds
        if now + work < failure:
            now, done = now + work, done + until_save
            saved = done
        else:
            now, done = failure + run.restart_seconds, saved
            failure = now + chance.expovariate(rate)
    return saved / now


def test_the_closed_form_is_what_a_simulated_run_keeps() -> None:
    found = sum(simulated(RUN, 2000, seed) for seed in range(5)) / 5
    # To first order in the failures of an interval, of which there are 0.13: to 1% of the time.
    assert RUN.share == pytest.approx(found, abs=0.01)
    assert RUN.share < 0.9, "with failures that cost something"


def test_the_best_interval_loses_least() -> None:
    best = replace(RUN, interval_seconds=RUN.best_interval_seconds).share
    others = [replace(RUN, interval_seconds=seconds).share for seconds in range(30, 3600, 10)]
    assert max(others) - best < 2e-4 and min(others) < best - 0.1


def test_a_plans_goodput_follows_from_its_recipe() -> None:
    recipe = load_recipe(YAMLS / "dbrx.yaml", ["checkpoint.interval_batches=500"])
    plan = make_plan(recipe, 3072, gpu_named("h100"))
    found = goodput(plan)
    assert 1 / found.failures_per_hour == pytest.approx(54 * 24 * 16_384 / 419 / 3072)
    assert found.interval_seconds == pytest.approx(500 * plan.step_seconds)
    # Weights and two moments, 12 bytes each, over the 192 ranks of a replica.
    assert found.save_seconds == pytest.approx(12 * 131.6e9 / 192 / 25e9, rel=0.05)
    assert goodput(plan, 0.0).share == pytest.approx(1, abs=0.01)
    assert goodput(plan, 1000 * PUBLISHED_FAILURES).share == 0.0
    copied = replace(recipe, checkpoint=replace(recipe.checkpoint, memory_interval_batches=1))
    with_copies = goodput(make_plan(copied, 3072, gpu_named("h100")))
    assert with_copies.rework_share == pytest.approx(found.rework_share / 500)
    assert with_copies.save_share == pytest.approx(501 * found.save_share)
    rechecked = replace(recipe, guard=replace(recipe.guard, recheck_interval_batches=50))
    twice = goodput(make_plan(rechecked, 3072, gpu_named("h100")))
    assert twice.share == pytest.approx(found.share / 1.04, rel=1e-3)
