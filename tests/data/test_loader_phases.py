"""Five phases, some with longer sequences: the global order is equal for any world size and start."""

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch

from data.batch import NO_TARGET, Batch
from data.loader import build_train_loader
from data.opened import OpenedData
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Phase, Recipe

S = 32
PHASES = [
    Phase(tokens=40 * 8 * S, weights={"code": 0.7, "prose": 0.3}, sequence_tokens=2 * S),
    Phase(
        tokens=20 * 8 * S,
        weights={"code": 0.7, "prose": 0.3},
        end_weights={"code": 0.1, "prose": 0.9},
        sequence_tokens=S,
    ),
    Phase(tokens=30 * 8 * S, weights={"code": 1.0}, sequence_tokens=2 * S),
    Phase(tokens=10 * 8 * S, weights={"prose": 0.6, "code": 0.4}, global_batch_sequences=8),
    Phase(tokens=25 * 8 * S, weights={"code": 0.2, "prose": 0.8}, sequence_tokens=S),
]


@pytest.fixture(scope="module")
def recipe(built: Recipe) -> Recipe:
    tokens = sum(phase.tokens for phase in PHASES)
    return dataclasses.replace(
        built,
        data=dataclasses.replace(built.data, domains={}, phases=PHASES, window_shards=2),
        training=dataclasses.replace(built.training, duration_tokens=tokens),
    )


@pytest.fixture(scope="module")
def whole(recipe: Recipe) -> list[Batch]:
    """Every batch of the run, read by a single rank."""
    loader = build_train_loader(OpenedData(recipe), rank=0, world_size=1)
    return list(islice(loader, plan_stages(recipe).batches))


@pytest.mark.parametrize("number", range(20))
def test_resuming_anywhere_on_any_world_gives_the_same_sequences(
    recipe: Recipe, whole: list[Batch], number: int
):
    rng = np.random.default_rng(number)
    curriculum = plan_stages(recipe)
    first = int(rng.integers(0, curriculum.batches - 4))
    world_size, workers = int(rng.choice([1, 2, 4])), int(rng.choice([0, 1, 2]))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=workers))
    start = curriculum.tokens_after(first - 1) // S if first else 0
    ranks = []
    for rank in range(world_size):
        loader = build_train_loader(OpenedData(recipe), rank=rank, world_size=world_size, start_sample=start)
        ranks.append(list(islice(loader, 4)))
    for parts, expected in zip(zip(*ranks, strict=True), whole[first : first + 4], strict=True):
        for key, tensor in expected.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), tensor), (number, key)


def test_batches_hold_what_the_plan_says_in_every_phase(recipe: Recipe, whole: list[Batch]):
    opened = OpenedData(recipe)
    plan = opened.plan(plan_stages(recipe))
    folders = [opened.shards(domain, "train") for domain in plan.domains]
    at, joined, broken = 0, 0, 0
    for batch, tokens in zip(whole, (batch["input_ids"] for batch in whole), strict=True):
        step = tokens.shape[1] // S
        picks = plan.samples(at, tokens.numel() // S)
        assert batch["sample_positions"].tolist() == list(range(at, at + picks.sample.size, step))
        assert batch["domain_ids"].tolist() == picks.domain[::step].tolist()
        for row in range(tokens.shape[0]):
            numbers = picks.sample[row * step : (row + 1) * step]
            samples = [folders[picks.domain[row * step]][int(n)] for n in numbers]
            assert tokens[row].tolist() == np.concatenate([s.tokens for s in samples]).tolist()
            for n in range(1, step):
                follows = numbers[n] == numbers[n - 1] + 1
                joined, broken = joined + follows, broken + (not follows)
                same = follows and samples[n].documents[0] == samples[n - 1].documents[-1]
                ids, target = batch["document_ids"][row], int(batch["targets"][row, n * S - 1])
                assert (ids[n * S] == ids[n * S - 1]) == same
                assert (target == NO_TARGET) != follows or samples[n].documents[0] < 0
        at += picks.sample.size
    assert at == plan_stages(recipe).samples and joined > broken > 0
