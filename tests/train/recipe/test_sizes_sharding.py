"""The closed form of placements against the real modules, sharded under a fake process group."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fake_world import local, sharded
from train.layout import mesh
from train.recipe import sizes
from train.recipe.reading import load_recipe
from train.recipe.schema import Model, Moe, Parallelism

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
TINY = Model(
    d_model=48,
    n_layers=2,
    n_heads=3,
    n_kv_heads=1,
    ffn_hidden_size=36,
    vocab_size=100,
    max_sequence_tokens=64,
    moe=Moe(experts=8, top_k=2),
)


MIXED = replace(
    TINY, n_layers=4, qkv_bias=True, moe=Moe(experts=8, top_k=2, dense_layers=1, every_n_layers=2)
)


@pytest.mark.parametrize("model", [TINY, MIXED], ids=["experts", "mixed"])
@pytest.mark.parametrize(
    ("layout", "world", "ranks"),
    [
        (Parallelism(), 2, (0, 1)),
        (Parallelism(), 7, (0, 5, 6)),
        (Parallelism(expert=4), 4, (0, 3)),
        (Parallelism(expert=2), 12, (0, 1, 9, 11)),
        (Parallelism(replicate=2, expert=4), 24, (0, 11, 12, 23)),
        (Parallelism(pipeline=2, expert=2), 8, (0, 3, 4, 7)),
        (Parallelism(pipeline=2, replicate=2), 8, (0, 3, 5)),
    ],
)
def test_every_rank_holds_what_the_closed_form_says(
    layout: Parallelism, world: int, ranks: tuple[int, ...], model: Model
) -> None:
    for rank in ranks:
        with sharded(model, layout, world, rank) as decoder:
            real = {name: local(p).numel() for name, p in decoder.named_parameters()}
        assert real == sizes.rank_weights(model, layout, world, rank)


def test_shards_add_up_to_the_model() -> None:
    layout, world = Parallelism(replicate=2, expert=4), 24
    copies = [sum(sizes.rank_weights(TINY, layout, world, rank).values()) for rank in range(world)]
    routers = sum(weight.elements for weight in sizes.weights(TINY) if ".router." in weight.name)
    others = sizes.total_parameters(TINY) - routers
    assert sum(copies) == layout.replicate * others + world * routers


def test_stages_have_all_weights_once_and_ranks_read_what_their_stages_do() -> None:
    layout, world = Parallelism(replicate=2, pipeline=2, expert=2, pipeline_layers=[1, 3]), 8
    held = [sizes.rank_weights(MIXED, layout, world, rank) for rank in range(world)]
    names = [weight.name for weight in sizes.weights(MIXED)]
    assert sorted([*held[0], *held[2]]) == sorted(names)
    assert [sum("blocks" in name for name in held[rank]) for rank in (0, 2)] == [
        sum(f"blocks.{layer}." in name for name in names for layer in layers) for layers in ([0], [1, 2, 3])
    ]
    assert [sizes.reader_of(layout, world, rank) for rank in range(world)] == [0, 1, 0, 1, 2, 3, 2, 3]


RECIPES = sorted(set(YAMLS.glob("*.yaml")) - set(YAMLS.glob("ladder*.yaml")))  # families of recipes


@pytest.fixture
def freed() -> Iterator[None]:
    """Nothing is left of a model of hundreds of billions, whose address space would keep a later fork from
    finding room, though nothing was written there."""
    yield
    gc.collect()


@pytest.mark.usefixtures("freed")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_weights_of_every_recipe_to_the_byte(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "initialize", lambda *_: None)  # values are irrelevant here
    recipe = load_recipe(path)
    world = 8 * recipe.parallelism.replicate * recipe.parallelism.expert
    expected = sizes.rank_weights(recipe.model, recipe.parallelism, world, rank=world - 1)
    with sharded(recipe.model, recipe.parallelism, world, rank=world - 1) as decoder:
        real = {name: local(p) for name, p in decoder.named_parameters()}
        assert {name: shard.numel() for name, shard in real.items()} == expected
        assert all(shard.dtype is torch.float32 for shard in real.values())
