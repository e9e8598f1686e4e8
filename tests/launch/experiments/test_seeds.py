"""A batch of seeds computes what a run of each of them computes."""

import itertools

import pytest

from data.opened import OpenedData
from data.write_shards import ensure_shards
from launch.experiments.bench.seeds import Alone, Together, batches
from train.recipe.reading import load_recipe

RECIPE = "yamls/ladder/transfer.yaml"
STEPS = 4


def test_a_seed_has_the_same_losses_alone_and_in_a_batch() -> None:
    recipe = load_recipe(RECIPE, ["training.global_batch_sequences=4", "model.n_layers=1"])
    ensure_shards(OpenedData(recipe))
    seeds = [1, 2, 3]
    together = Together(recipe, seeds)
    found = [together.step(batch) for batch in itertools.islice(batches(recipe, seeds), STEPS)]
    for n, seed in enumerate(seeds):
        alone = Alone(recipe, [seed])
        wanted = [alone.step(batch)[0] for batch in itertools.islice(batches(recipe, [seed]), STEPS)]
        assert [losses[n] for losses in found] == pytest.approx(wanted, rel=1e-5)
