"""The guard detects spikes, non-finite numbers and collapsed routers; a resumed guard decides alike."""

import math
import random

import pytest

from train.recipe.reliability import Guard as GuardRecipe
from train.recipe.reliability import OnCollapse, OnNonfinite, OnSpike
from train.step.guard import Action, RouterLoad, UpdateGuard

WINDOW = 32


def steps(count: int, seed: int = 0) -> list[tuple[float, float]]:
    generator = random.Random(seed)
    return [(4 + generator.gauss(0, 0.05), 1 + abs(generator.gauss(0, 0.1))) for _ in range(count)]


def test_a_spike_is_skipped_and_an_ordinary_step_is_not() -> None:
    guard = UpdateGuard(GuardRecipe(on_spike=OnSpike.skip, window_batches=WINDOW))
    assert all(guard.judge(loss, norm).action is Action.apply for loss, norm in steps(300))
    verdict = guard.judge(7.0, 1.0)
    assert verdict.action is Action.skip and "loss 7" in verdict.alarms[0]
    assert guard.judge(4.0, 5.0).alarms == [], "as one sequence of eight has it, seen in sound runs"
    assert "gradient norm 30 is" in guard.judge(4.0, 30.0).alarms[0]
    assert [7.0, 1.0] not in guard.recent and guard.judge(4.0, 1.0).action is Action.apply


def test_an_alarm_says_by_how_many_deviations() -> None:
    """3.9 and 4.1 are 0.1 from their median; 1.4826 times that is a deviation, and 7 is 20.2 above it."""
    guard = UpdateGuard(GuardRecipe(window_batches=WINDOW))
    for number in range(WINDOW):
        guard.judge(3.9 + 0.2 * (number % 2), 1.0)
    (alarm,) = guard.judge(7.0, 1.0).alarms
    assert alarm == f"spike: loss 7 is 1.75 x the median of the last {WINDOW} steps (20 deviations above it)"


@pytest.mark.parametrize(("window", "least"), [(100, 25), (40, 10), (8, 8)])
def test_nothing_stands_out_before_a_quarter_of_the_window_is_full(window: int, least: int) -> None:
    for known in (least - 1, least):
        guard = UpdateGuard(GuardRecipe(on_spike=OnSpike.skip, window_batches=window))
        assert all(guard.judge(loss, norm).action is Action.apply for loss, norm in steps(known))
        assert (guard.judge(7.0, 1.0).action is Action.skip) == (known == least)


def test_only_an_alarm_is_raised_where_the_recipe_says_so() -> None:
    guard = UpdateGuard(GuardRecipe(window_batches=WINDOW))
    for loss, norm in steps(WINDOW):
        guard.judge(loss, norm)
    verdict = guard.judge(7.0, 1.0)
    assert verdict.action is Action.apply and verdict.alarms


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("action", list(OnNonfinite))
def test_what_is_not_finite_is_never_applied(value: float, action: OnNonfinite) -> None:
    guard = UpdateGuard(GuardRecipe(nonfinite=action, most_skips=2))
    assert guard.judge(value, 1.0).action.value == action.value
    assert guard.judge(4.0, value).action.value == action.value
    if action is OnNonfinite.skip:
        assert guard.judge(value, 1.0).action is Action.stop
    assert guard.recent == []


def test_a_resumed_guard_decides_as_the_one_before() -> None:
    recipe = GuardRecipe(on_spike=OnSpike.skip, window_batches=WINDOW, loss_deviations=2.0)
    whole, history = UpdateGuard(recipe), steps(200, seed=1)
    expected = [whole.judge(loss, norm).action for loss, norm in history]
    first = UpdateGuard(recipe)
    found = [first.judge(loss, norm).action for loss, norm in history[:90]]
    second = UpdateGuard(recipe, first.recent)
    found += [second.judge(loss, norm).action for loss, norm in history[90:]]
    assert found == expected and Action.skip in expected[90:]


def test_a_rollback_has_the_batches_at_fault() -> None:
    recipe = GuardRecipe(
        on_spike=OnSpike.rollback,
        nonfinite=OnNonfinite.rollback,
        on_collapse=OnCollapse.rollback,
        window_batches=WINDOW,
        collapse_batches=3,
    )
    guard = UpdateGuard(recipe)
    for loss, norm in steps(WINDOW):
        guard.judge(loss, norm)
    assert guard.judge(7.0, 1.0).action is guard.judge(math.nan, 1.0).action is Action.rollback
    bad = RouterLoad(entropy=0.1, dead_share=0.0, busiest_over_mean=1.0)
    guard.judge(4.0, 1.0, bad)
    # The run is resumed halfway through a collapse.
    resumed = UpdateGuard(recipe, guard.recent, guard.counts)
    assert resumed.judge(4.0, 1.0, bad).action is Action.apply
    verdict = resumed.judge(4.0, 1.0, bad)
    assert verdict.action is Action.rollback and verdict.batches == 3


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (RouterLoad(entropy=0.1, dead_share=0.0, busiest_over_mean=1.5), "entropy 0.100 below"),
        (RouterLoad(entropy=0.9, dead_share=0.8, busiest_over_mean=1.5), "80% of a layer's experts are dead"),
        (RouterLoad(entropy=0.9, dead_share=0.0, busiest_over_mean=12.0), "12.0 times its layer's mean load"),
    ],
)
def test_each_sign_of_a_collapse_is_one(load: RouterLoad, reason: str) -> None:
    verdict = UpdateGuard(GuardRecipe(collapse_batches=1)).judge(4.0, 1.0, load)
    (alarm,) = verdict.alarms
    assert reason in alarm and "," not in alarm.partition(": ")[2]


def test_a_collapse_raises_one_alarm_when_it_has_lasted() -> None:
    guard = UpdateGuard(GuardRecipe(collapse_batches=3, on_collapse=OnCollapse.stop))
    bad = RouterLoad(entropy=0.1, dead_share=0.8, busiest_over_mean=12.0)
    good = RouterLoad(entropy=0.9, dead_share=0.0, busiest_over_mean=1.5)
    loads = [bad, bad, good, bad, bad, bad]
    verdicts = [guard.judge(4.0, 1.0, load) for load in loads]
    assert [bool(verdict.alarms) for verdict in verdicts] == [False] * 5 + [True]
    assert verdicts[-1].action is Action.stop and "12.0 times" in verdicts[-1].alarms[0]
