"""Every switch of the benchmark turns something on in a valid recipe."""

from pathlib import Path

import pytest

from launch.experiments.bench.switches import SWITCHES
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology

SMOKE = str(Path(__file__).parents[3] / "yamls/smoke.yaml")


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_makes_another_valid_recipe(name: str) -> None:
    switched = load_recipe(SMOKE, list(SWITCHES[name]))
    validate(switched, Topology(), SMOKE)
    assert switched != load_recipe(SMOKE, [])
