"""The rehearsal of rank 0 against the same start, step and plan among real ranks; limits and exit status."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import get_state_dict

from launch.rehearse import limits, step
from launch.rehearse.__main__ import main
from launch.rehearse.alone import join_alone
from launch.rehearse.plans import plans_of
from launch.rehearse.start import rehearse_start, reserve_moments
from launch.rehearse.step import rehearse_step
from launch.verify.forked_ranks import run_ranks
from train.checkpoint.files import writing_ranks
from train.checkpoint.planning import SavePlanner
from train.health.descriptors import gloo_groups
from train.layout import mesh
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.recipe import sizes
from train.recipe.reading import load_recipe
from train.recipe.schema import Parallelism, Precision, Recipe
from train.recipe.topology import Topology
from train.step.microbatch import MicrobatchModel

ROOT = Path(__file__).resolve().parents[3]
SMOKE = str(ROOT / "yamls/smoke.yaml")
WORLD = 8
LAYOUTS = [Parallelism(), Parallelism(expert=2, gathered_layers=1), Parallelism(replicate=2, expert=2)]

DENSE_IN_TURN = ["model.n_layers=9", "model.moe.dense_layers=1", "model.moe.every_n_layers=2"]


def recipe(layout: Parallelism, *overrides: str) -> Recipe:
    found = load_recipe(SMOKE, ["training.microbatch_sequences=1", "model.n_layers=2", *overrides])
    return replace(found, model=step.narrowed(found.model), parallelism=layout)


def state_of(layout: Parallelism, world: int) -> dict[str, Any]:
    """The state of this rank of a job."""
    found = recipe(layout)
    decoder = Decoder(found.model, device="meta")
    mesh.build_sharded(decoder, mesh.build_mesh(layout, world, "cpu"), Precision.fp32, 0)
    model = MicrobatchModel(decoder, found, Precision.fp32)
    optimizer = build_optimizer(model, found.optimizer)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def own_plan(state: dict[str, Any], *, is_coordinator: bool) -> SavePlan:
    planner = SavePlanner()
    planner.set_up_planner(state, is_coordinator=is_coordinator)
    return planner.create_local_plan()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_other_ranks_plans_are_what_they_would_send(layout: Parallelism) -> None:
    writers = writing_ranks(WORLD, layout.replicate)

    def among_others(topology: Topology) -> SavePlan:
        return own_plan(state_of(layout, WORLD), is_coordinator=topology.is_main)

    def alone(_: Topology) -> list[SavePlan]:
        join_alone(WORLD, 0)
        state = state_of(layout, WORLD)
        own = own_plan(state, is_coordinator=True)
        return [own, *plans_of(flatten_state_dict(state)[0], writers[1:])]

    real = run_ranks(WORLD, among_others)
    (rehearsed,) = run_ranks(1, alone)
    assert len(rehearsed) == len(writers)
    for rank, plan in zip(writers, rehearsed, strict=True):
        assert plan == real[rank], rank


@pytest.mark.slow
def test_moments_are_reserved_in_the_form_that_a_step_gives_them() -> None:
    def work(_: Topology) -> tuple[SavePlan, SavePlan]:
        join_alone(WORLD, 0)
        found, plans = recipe(Parallelism(expert=2)), []
        for reserves in (False, True):
            decoder = Decoder(found.model, device="meta")
            mesh.build_sharded(decoder, mesh.build_mesh(found.parallelism, WORLD, "cpu"), Precision.fp32, 0)
            model = MicrobatchModel(decoder, found, Precision.fp32)
            optimizer = build_optimizer(model, found.optimizer)
            if reserves:
                reserve_moments(optimizer, build_optimizer(torch.nn.Linear(2, 2), found.optimizer))
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            plans.append(own_plan(state, is_coordinator=True))
        return plans[0], plans[1]

    ((stepped, reserved),) = run_ranks(1, work)
    assert reserved == stepped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "layers"),
    [*((layout, ["model.n_layers=3"]) for layout in LAYOUTS), (LAYOUTS[1], DENSE_IN_TURN)],
    ids=str,
)
def test_the_step_issues_the_collectives_of_a_real_rank(layout: Parallelism, layers: list[str]) -> None:
    """A model as deep as the two that are rehearsed would be scaled to, on real ranks of gloo."""
    again = ["training.recompute=layer", "training.recompute_layers=1", "training.recompute_rest=gates"]
    found = recipe(layout, *layers, "training.global_batch_sequences=16", *again)
    (rehearsed,) = run_ranks(1, lambda _: rehearse_step(found, WORLD))

    def among_others(_: Topology) -> dict[Any, int]:
        built = mesh.build_mesh(layout, WORLD, "cpu")
        grades = sizes.recomputed(found.training, found.model.n_layers)
        return dict(step.count_step(found, grades, built))

    calls = run_ranks(WORLD, among_others)[0]
    assert rehearsed.collectives == calls
    assert any(ranks == layout.expert for name, ranks in calls if "to" in name) == (layout.expert > 1)


@pytest.mark.slow
def test_a_start_at_3072_ranks_makes_the_groups_that_open_files_are_counted_for() -> None:
    layout = Parallelism(replicate=24, expert=16)
    found = replace(recipe(layout), parallelism=layout)
    (start,) = run_ranks(1, lambda _: rehearse_start(found, 3072, 128, 8))
    mine = [group for group in start.groups if group.is_member]
    assert [group.ranks for group in mine if group.backend == "gloo"] == []  # Rank 128 writes nothing.
    (main_rank,) = run_ranks(1, lambda _: rehearse_start(found, 3072, 0, 8))
    mine = [group for group in main_rank.groups if group.is_member]
    assert [group.ranks for group in mine if group.backend == "gloo"] == gloo_groups(layout, 3072, True)
    assert sorted(group.ranks for group in mine if not group.backend) == [8, 16, 24, 128]
    # 128 replicate groups, 384 of shard, 192 of expert, 24 of dense, and the saver's.
    assert len(main_rank.groups) == 128 + 384 + 192 + 24 + 1
    assert main_rank.planning is not None and main_rank.planning.writers == 128
    assert start.planning is None


def test_a_sent_plan_says_once_what_is_equal() -> None:
    class AlikeLayers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(50))

    state = {"model": dict(AlikeLayers().state_dict())}
    plain = torch.distributed.checkpoint.DefaultSavePlanner()
    plain.set_up_planner(state, is_coordinator=True)
    ours = own_plan(state, is_coordinator=False)
    assert ours.items == plain.create_local_plan().items
    assert len(pickle.dumps(ours)) < len(pickle.dumps(plain.create_local_plan())) / 2


def test_what_is_over_its_limit_is_said_with_the_remedy() -> None:
    figure = limits.RehearsedFigure(
        "open_files", "open files", 3715, "", 0, 2048, "the limit here", "raise it"
    )
    assert limits.lines_over([figure, replace(figure, limit=4096), replace(figure, limit=None)]) == [
        "open files of rank 0: 3,715, 1.8 times the 2,048 of the limit here; raise it"
    ]


@pytest.mark.slow
def test_the_command_ends_with_1_if_a_job_would_not_come_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = [SMOKE, "--gpus", "8", "--json", str(file), "parallelism.replicate=2", "model.n_layers=2"]
    arguments.append("training.microbatch_sequences=1")
    assert main([*arguments, "--open-files", "300"]) == 1
    assert "open files of rank 4: 5" in capsys.readouterr().out
    tree = json.loads(file.read_text())
    over = {(figure["key"], figure["rank"]) for figure in tree["figures"] if figure["is_over"]}
    assert over == {("all_open_files", 0), ("all_open_files", 4)}


def test_an_impossible_recipe_is_a_line_for_each_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SMOKE, "--gpus", "8", "parallelism.replicate=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{SMOKE}: ") for line in lines)
