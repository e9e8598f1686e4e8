"""A batch's sums do not depend on how it is split, and a skipped update leaves no trace."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Timestamp

from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Precision, Recipe
from train.recipe.topology import Topology
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch
from train.step.step import TrainingStep

TinyRecipe = Callable[..., Recipe]
B, S = 8, 64


@pytest.fixture(scope="module")
def recipe(tiny_recipe: TinyRecipe) -> Recipe:
    return tiny_recipe(Path("runs"), Path("shards"), "step", "model.moe.balance=bias")


class Refusing:
    """Alarms that apply or refuse every update and record the calls."""

    def __init__(self, applies: bool) -> None:
        self.applies = applies
        self.asked: list[tuple[Any, ...]] = []

    def is_applied(self, *about: Any) -> bool:
        self.asked.append(about)
        return self.applies


def trained(recipe: Recipe, microbatch: int, alarms: Any = None, batches: int = 1) -> TrainingStep:
    """Runs batches without optimizer steps, in microbatches of the given number of sequences."""
    decoder = Decoder(recipe.model)
    initialize(decoder, recipe.model, 3)
    model = LanguageModel(decoder, recipe, Precision.fp32)
    step = TrainingStep(recipe, model, Topology(), plan_stages(recipe), alarms)
    ids_BS = torch.randint(recipe.model.vocab_size, (B, S), generator=torch.Generator().manual_seed(1))
    whole: Batch = {
        "input_ids": ids_BS,
        "targets": ids_BS.roll(-1, dims=1),
        "document_ids": torch.zeros_like(ids_BS),
        "sample_positions": torch.arange(B),
    }
    state: Any = SimpleNamespace(
        timestamp=Timestamp(batch=6, sample=48), device_train_microbatch_size=microbatch
    )
    logger: Any = SimpleNamespace(log_metrics=lambda _: None)
    for _ in range(batches):
        state.batch = whole
        step.before_train_batch(state, logger)
        for row in range(0, B, microbatch):
            state.batch = {key: value[row : row + microbatch] for key, value in whole.items()}
            state.outputs = model(state.batch)
            state.loss = model.loss(state.outputs, state.batch)
            step.after_loss(state, logger)
            step.before_backward(state, logger)
            (state.loss["total"] * microbatch / B).backward()
        step.after_train_batch(state, logger)
    return step


def bias(step: TrainingStep) -> torch.Tensor:
    return torch.stack([each for name, each in step.model.named_buffers() if "expert_bias" in name])


def test_totals_are_those_of_the_batch_however_it_is_split(recipe: Recipe) -> None:
    whole, split = trained(recipe, B).totals, trained(recipe, 2).totals
    assert whole is not None and split is not None and recipe.model.moe is not None
    whole_LE, split_LE = whole.expert_tokens_LE, split.expert_tokens_LE
    assert whole_LE is not None and split_LE is not None and torch.equal(whole_LE, split_LE)
    assert split_LE.sum(dim=1).tolist() == [B * S * recipe.model.moe.top_k] * recipe.model.n_layers
    assert split.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert (split.tokens, split.sequence_tokens) == (whole.tokens, whole.sequence_tokens) == (B * S, S)


def test_the_guard_is_asked_about_the_batch(recipe: Recipe) -> None:
    alarms = Refusing(applies=True)
    step = trained(recipe, 4, alarms)
    ((batch, first, positions, totals, loss, norm),) = alarms.asked
    assert (batch, first, positions) == (6, 48, B) and totals is step.totals and norm > 0
    assert loss == totals.loss.item()


@pytest.mark.parametrize("applies", [True, False])
def test_a_refused_update_has_no_gradients_and_leaves_the_bias(recipe: Recipe, applies: bool) -> None:
    step = trained(recipe, B, Refusing(applies))
    assert all((p.grad is not None) == applies for p in step.model.parameters())
    assert bias(step).any() == applies


def test_the_next_batch_begins_at_zero(recipe: Recipe) -> None:
    refusing = Refusing(applies=False)
    once, twice = (trained(recipe, 4, refusing, batches).totals for batches in (1, 2))
    assert once is not None and twice is not None and once is not twice
    assert twice.tokens == once.tokens
    assert twice.loss == once.loss, "nothing was updated in between"
    assert torch.equal(twice.expert_tokens_LE, once.expert_tokens_LE)  # type: ignore[arg-type]
