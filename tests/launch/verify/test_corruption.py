"""Flipped bits are found, healthy runs are not accused, and a run with rechecks is the run without."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from launch.verify.bit_flips import BitFlip, flip_gradient
from launch.verify.cases import Layout
from launch.verify.corruption import CorruptionCheck, draw
from launch.verify.equality import differences
from launch.verify.forked_ranks import Ranks
from launch.verify.harness import Workspace
from launch.verify.tiny_runs import PATIENCE_SECONDS, named
from train import run
from train.health.exclusion import CORRUPTION_FILE, EXCLUDED_FILE
from train.health.heartbeat import RECORDS_FOLDER
from train.layout import mesh
from train.recipe.exit_status import UNFIT_STATUS
from train.recipe.reading import load_recipe
from train.recipe.schema import Checkpoint, Recipe
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"
LAYOUT = Layout(1, 2, 1)


def test_flipped_bits_are_found_and_healthy_runs_are_not_accused(tmp_path: Path) -> None:
    check = CorruptionCheck(flips=4, healthy=1)
    rows = list(check.run(Workspace(load_recipe(SMOKE), tmp_path)))
    assert [violation for row in rows for violation in row.violations] == []
    assert [row.what.split(" x ")[0] for row in rows] == [
        *("weight", "gradient", "activation", "collective", "transient", "healthy")
    ]


def test_every_place_and_layout_is_drawn() -> None:
    meshes = [Layout(1, 4, 1), Layout(1, 2, 2)]
    trials = [trial for trial in draw(20, 0, meshes, 0) if trial.most is None]
    for place in ("weight", "gradient", "activation"):
        kinds = {(t.layout, t.is_stuck) for t in trials if t.place.split(" at")[0] == place}
        assert len(kinds) == 4, place
    assert {t.layout for t in trials if t.place == "collective"} == set(meshes)


def ended(recipe: Recipe, wrong_rank: int | None = None) -> list[int | None]:
    """Trains on two ranks, one of which may flip a bit of a gradient in every pass; their exit statuses."""

    def work(topology: Topology) -> None:
        flip = BitFlip(0, is_on=topology.rank == wrong_rank)
        original = mesh.build_sharded

        def build(*args: object) -> None:
            original(*args)  # type: ignore[arg-type]
            flip_gradient(args[0], flip)  # type: ignore[arg-type]

        host = {"FINEGRAIN_HOST": f"n{topology.rank}"}
        is_wrong = wrong_rank is not None
        faulty = mock.patch.object(run, "build_sharded", build) if is_wrong else contextlib.nullcontext()
        with mock.patch.dict(os.environ, host), faulty:
            status = run.run(recipe, topology)
        if status:
            raise SystemExit(status)

    log = Path(recipe.runs_dir) / f"{recipe.name}.log"
    with Ranks(LAYOUT.world_size, work, log) as ranks:
        return ranks.exit_codes(PATIENCE_SECONDS)


def test_a_run_that_finds_a_wrong_host_resumes_without_it_as_if_nothing_had_been(tmp_path: Path) -> None:
    workspace = Workspace(load_recipe(SMOKE), tmp_path)
    whole = workspace.uninterrupted(LAYOUT)
    small = replace(workspace.small, checkpoint=Checkpoint(interval_batches=2, keep_last=20))
    recipe = named(small, LAYOUT, "rechecked")
    recipe = replace(recipe, guard=replace(recipe.guard, recheck_interval_batches=5))
    folder = tmp_path / "rechecked"
    assert ended(recipe, wrong_rank=1) == [UNFIT_STATUS] * 2
    records = folder / RECORDS_FOLDER
    [found] = [json.loads(line) for line in (records / CORRUPTION_FILE).read_text().splitlines()]
    assert (found["batch"], found["ranks"], found["hosts"], found["persistent"]) == (4, [1], ["n1"], True)
    assert list(json.loads((records / EXCLUDED_FILE).read_text())) == ["n1"]
    assert ended(recipe)[1] == UNFIT_STATUS, "the host is refused"
    (records / EXCLUDED_FILE).unlink()
    assert ended(recipe) == [0, 0]
    assert list(differences(whole, folder)) == [], "from the beginning, since nothing was rechecked before"
