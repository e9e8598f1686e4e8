"""Killed or preempted runs resume exactly, also under other layouts; a difference is noticed."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from launch.verify.cases import Layout
from launch.verify.equality import differences
from launch.verify.resumption import kill_and_resume, reshard
from launch.verify.tiny_runs import prepare, uninterrupted
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.record.summary import read_summary

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
ONE, TWO = Layout(1, 1, 1), Layout(1, 1, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return prepare(load_recipe(YAMLS / "smoke.yaml"), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(small: Recipe) -> Path:
    return uninterrupted(small, ONE)


def test_killed_runs_resume_bit_for_bit(small: Recipe, whole: Path) -> None:
    row = kill_and_resume(small, ONE, whole, 2, random.Random(0))
    assert row.has_passed, row.violations
    assert row.figures.startswith("2 kills")


def test_a_preempted_run_resumes_under_other_layouts(small: Recipe, whole: Path) -> None:
    chain = [ONE, Layout(1, 2, 2, tensor=2), Layout(2, 1, 2, context=4), Layout(1, 1, 2, pipeline=2)]
    rows = list(reshard(small, chain, whole))
    assert [row.layout for row in rows] == ["(1,1,1)", "(1,2,2)t2", "(2,1,2)c4", "(1,1,2)p2"]
    of_chain = read_summary(Path(small.runs_dir) / "chain").validation_loss
    assert of_chain == pytest.approx(read_summary(whole).validation_loss, rel=1e-4)
    for row in rows:
        assert row.has_passed, (row.figures, row.violations)


def test_a_run_of_another_seed_is_noticed(small: Recipe, whole: Path) -> None:
    other = replace(small, seed=small.seed + 1, runs_dir=f"{small.runs_dir}/other")
    Path(other.runs_dir).mkdir()
    found = uninterrupted(other, ONE)
    assert any("step 1" in each for each in differences(whole, found))
