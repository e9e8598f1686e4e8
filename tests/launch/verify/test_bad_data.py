"""A run that reads noise documents rolls back, excludes them, and equals one that never saw them."""

from pathlib import Path

import pytest

from launch.verify.bad_data import BadDataCheck
from launch.verify.harness import Workspace
from train.recipe.reading import load_recipe

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


def test_it_rolls_back_and_equals_the_run_that_never_saw_them(tmp_path: Path) -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml")
    check = BadDataCheck(steps=48)
    rows = list(check.run(Workspace(recipe, tmp_path)))
    assert [violation for row in rows for violation in row.violations] == []
    assert [row.what for row in rows[-3:]] == ["rolled back", "never seen", "only alarms"]
    assert "equal to it bit for bit" in rows[-2].figures
    outcome = check.outcome
    assert len(rows) == len(outcome.decisions) + 3 and any(outcome.named)
    assert outcome.declared and all("rolled back at step" in line for line in outcome.declared)
    assert check.figures(recipe)["noise"] == outcome.noise
