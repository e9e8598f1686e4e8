"""Stages of a pipeline in a plan: their weights, their memory, their idle time, and what they send."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan.hardware import gpu_named
from launch.plan.search import choice_of, pipelines, search
from launch.plan.stages import batch_seconds, memory_of, stages_of
from launch.plan.step import make_plan
from launch.plan.traffic import ENDS, SENT
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.pipeline import finish, passes
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
H100 = gpu_named("h100")
WORLD = 64
BATCH = "training.global_batch_sequences"


def _dbrx(*overrides: str) -> Recipe:
    keys = [
        "parallelism.replicate=1",
        "parallelism.pipeline=4",
        "data.phases=[]",
        "data.sequence_tokens=4096",
    ]
    keys += ["data.domains={code: 0.5, prose: 0.5}", "training.microbatch_sequences=1"]
    return load_recipe(YAMLS / "dbrx.yaml", [*keys, *overrides])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dbrx", "model.tie_embeddings=false"),
        ("dbrx", "model.tie_embeddings=true"),
        ("dbrx", "parallelism.tensor=4"),
        ("deepseek-v3", "model.mtp=false"),
        ("deepseek-v3", "model.mtp=true"),
    ],
)
def test_stages_hold_what_ranks_hold(name: str, own: str) -> None:
    recipe = load_recipe(YAMLS / f"{name}.yaml", [own])
    recipe = replace(recipe, parallelism=replace(recipe.parallelism, replicate=1, pipeline=4, expert=8))
    for rank in (0, 16, 32, 63):
        held = 4 * sum(sizes.rank_weights(recipe.model, recipe.parallelism, WORLD, rank).values())
        assert memory_of(recipe, WORLD, rank=rank).weights == pytest.approx(held, rel=1e-3)


def test_a_stage_keeps_the_microbatches_that_are_under_way_behind_it() -> None:
    stages = stages_of(_dbrx(), WORLD)
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    # Of two stages with as many layers, what the first keeps more is a microbatch for each stage between.
    assert len({stage.recipe.model.n_layers for stage in stages[:3]}) == 1
    kept = [memory_of(_dbrx(), WORLD, rank=rank).activations for rank in (0, 16, 32)]
    assert kept[0] - kept[1] == pytest.approx(kept[1] - kept[2], rel=1e-6)
    assert kept[0] > kept[1]
    assert memory_of(_dbrx(), WORLD).total == max(
        memory_of(_dbrx(), WORLD, rank=r).total for r in (0, 16, 32, 48)
    )


def test_idle_time_is_that_of_the_schedule_played_to_its_end() -> None:
    recipe, of_parts = _dbrx(), [(1.0, 2.0), (1.1, 2.3), (0.9, 1.7), (1.2, 2.4)]
    microbatches = sizes.microbatches_per_rank(recipe, WORLD)
    assert microbatches > 16, "the rest is extrapolated"
    order = [passes(4, 1, microbatches, stage) for stage in range(4)]
    hop = batch_seconds(recipe, WORLD, H100, [(0.0, 0.0)] * 4, 0.85) / 6  # there and back
    forward, backward = zip(*of_parts, strict=True)
    expected = finish(order, 1, forward, backward, hop)
    assert batch_seconds(recipe, WORLD, H100, of_parts, 0.85) == pytest.approx(expected, rel=1e-3)


def test_more_chunks_are_idle_for_less_time_and_send_more() -> None:
    plans = [
        make_plan(_dbrx(f"parallelism.pipeline_chunks={chunks}", f"{BATCH}={batch}"), WORLD, H100)
        for chunks, batch in ((1, 128), (2, 128), (1, 1024))
    ]
    idle = [plan.seconds.idle / plan.step_seconds for plan in plans]
    # A batch of 8 microbatches: 3 of 11 of the time, but for the update, and what stages differ in.
    assert idle[2] < idle[1] < idle[0] < 3 / 11
    sent = [next(each for each in plan.collectives if each.what == SENT) for plan in plans]
    assert sent[1].calls == 2 * sent[0].calls
    assert sent[0].sent_bytes() == 4096 * plans[0].recipe.model.d_model * 2


def test_an_embedding_of_both_ends_is_summed_once_a_step() -> None:
    plain, tied = (
        make_plan(_dbrx(f"model.tie_embeddings={tied}"), WORLD, H100) for tied in ("false", "true")
    )
    assert not [each for each in plain.collectives if each.what == ENDS]
    (summed,) = [each for each in tied.collectives if each.what == ENDS]
    model, stage = tied.recipe.model, WORLD // 4
    assert summed.payload_bytes == 4 * model.vocab_size * model.d_model / stage
    assert (summed.ranks, summed.stride, summed.calls_in_step(8)) == (2, 3 * stage, 1)


def test_one_gpu_a_stage_is_refused() -> None:
    with pytest.raises(UserError, match="gives each stage one GPU"):
        make_plan(_dbrx("parallelism.expert=1"), 4, H100)


def test_the_search_tries_stages_of_what_they_are_built_for() -> None:
    assert pipelines(_dbrx(), WORLD) == [2, 4, 8, 16]
    assert not pipelines(_dbrx("training.offload=true", "training.recompute=layer"), WORLD)


def test_the_search_finds_stages_where_the_network_is_slow() -> None:
    slow = replace(H100, network_bandwidth=H100.network_bandwidth / 100)
    best = search(_dbrx("parallelism.pipeline=1", f"{BATCH}={WORLD}"), WORLD, slow)[0]
    assert choice_of(best.recipe).pipeline > 1
    assert f"parallelism.pipeline={choice_of(best.recipe).pipeline}" in choice_of(best.recipe).overrides()
