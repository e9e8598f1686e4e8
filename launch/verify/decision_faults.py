"""Faults of what each rank decides by itself, for the parity gate's input `loaded` to find.

Each is a context in which every rank but the first trains on other sequences, noise or settings.
"""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from data import loader
from data.loader import TrainSequences
from train.model.decoder import Decoder
from train.model.router import Jitter
from train.recipe.curriculum import Curriculum
from train.recipe.schema import Recipe
from train.step import microbatch, step
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch


def read_first_share() -> AbstractContextManager[Any]:
    """Every rank reads the first rank's sequences."""
    original = TrainSequences.__init__

    def init(self: TrainSequences, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"rank": 0})

    return mock.patch.object(TrainSequences, "__init__", init)


def join_documents() -> AbstractContextManager[Any]:
    """Takes each sequence for one document."""
    original = loader.open_block

    def opened(block: Tensor) -> Batch:
        batch = original(block)
        if dist.get_rank():
            batch["document_ids"] = torch.zeros_like(batch["document_ids"])
        return batch

    return mock.patch.object(loader, "open_block", opened)


def draw_noise_by_place() -> AbstractContextManager[Any]:
    """Draws router noise by the place in the microbatch, on every rank, not by the position in training."""
    return mock.patch.object(
        microbatch, "Jitter", lambda key, positions, *_: Jitter(key, torch.arange(len(positions)))
    )


def keep_first_base() -> AbstractContextManager[Any]:
    """Never changes RoPE's base."""
    original = Decoder.set_rope_theta

    def set_theta(self: Decoder, theta: float) -> None:
        if not dist.get_rank():
            original(self, theta)

    return mock.patch.object(Decoder, "set_rope_theta", set_theta)


def keep_first_rate_scale() -> AbstractContextManager[Any]:
    """Leaves out a phase's factor of the learning rate."""
    original = step.learning_rate

    def rate(recipe: Recipe, curriculum: Curriculum, batch: int) -> float:
        scale = curriculum.stage_of(batch).learning_rate_scale if dist.get_rank() else 1.0
        return original(recipe, curriculum, batch) / scale

    return mock.patch.object(step, "learning_rate", rate)


def lose_z_loss() -> AbstractContextManager[Any]:
    """Leaves out the routers' z-loss."""
    original = LanguageModel.loss

    def loss(self: LanguageModel, *args: Any) -> dict[str, Tensor]:
        if dist.get_rank():
            self.z_weight = 0.0
        return original(self, *args)

    return mock.patch.object(LanguageModel, "loss", loss)
