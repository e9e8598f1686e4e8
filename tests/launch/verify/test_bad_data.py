"""A run that meets planted documents goes back, leaves them out, and is that of one that never saw them."""

from pathlib import Path

from launch.verify.bad_data import show
from train.recipe.reading import load_recipe

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


def test_it_goes_back_and_is_the_run_that_never_saw_them(tmp_path: Path) -> None:
    outcome = show(load_recipe(YAMLS / "smoke.yaml"), tmp_path, steps=44)
    assert outcome.faults == []
    assert any(outcome.named)
    assert outcome.declared and all("rolled back at step" in line for line in outcome.declared)
