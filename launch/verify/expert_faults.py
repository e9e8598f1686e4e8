"""Known faults of shared experts, balancing bias, sequences' balance loss and multi-token prediction."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.model.decoder import DecoderOutput, targets_ahead
from train.model.loss import IGNORE
from train.model.router import update_bias
from train.model.shared_expert import SharedExpert
from train.recipe.schema import Balance, BalanceScope, Score
from train.step import microbatch, step
from train.step.microbatch import MicrobatchModel

Changes = tuple[tuple[str, object], ...]
"""Keys of `model` or `model.moe` and their values."""
GLOBAL_SCOPE: Changes = (("balance", Balance.loss), ("balance_scope", BalanceScope.global_batch))
FINER: Changes = (
    ("score", Score.sigmoid),
    ("groups", 4),
    ("top_groups", 2),
    ("weight_scale", 2.5),
    ("shared_hidden_size", 256),
    ("balance", Balance.both),
    ("balance_scope", BalanceScope.sequence),
)
"""DeepSeek-V3's experts and routing, for 16 experts."""


def count_shared_by_degree(degree: int) -> AbstractContextManager[Any]:
    """Multiplies gradients of shared experts' weights by the expert degree, as if they were spread too."""
    original = SharedExpert.forward

    def forward(self: SharedExpert, x_BSD: Tensor) -> Tensor:
        of_weights_BSD = original(self, x_BSD.detach())
        return original(self, x_BSD) + (degree - 1) * (of_weights_BSD - of_weights_BSD.detach())

    return mock.patch.object(SharedExpert, "forward", forward)


def divide_by_own_targets() -> AbstractContextManager[Any]:
    """Divides each microbatch's loss of multi-token prediction by the targets that it happens to have."""

    def loss(self: MicrobatchModel, outputs: DecoderOutput, batch: microbatch.Batch) -> dict[str, Tensor]:
        sequences, length = batch["targets"].shape
        targets = (targets_ahead(batch["targets"], batch["document_ids"]) != IGNORE).sum().clamp(min=1)
        by_own = outputs.mtp_loss_sum * sequences * (length - 1) / targets
        return original(self, outputs._replace(mtp_loss_sum=by_own), batch)

    original = MicrobatchModel.loss
    return mock.patch.object(MicrobatchModel, "loss", loss)


def divide_by_microbatch_targets() -> AbstractContextManager[Any]:
    """Divides each microbatch's loss by the targets that it happens to have, as plain loops do."""

    def loss(self: MicrobatchModel, outputs: DecoderOutput, batch: microbatch.Batch) -> dict[str, Tensor]:
        sequences = len(batch["targets"])
        self.targets_per_sequence = (batch["targets"] != IGNORE).sum().clamp(min=1) / sequences
        return original(self, outputs, batch)

    original = MicrobatchModel.loss
    return mock.patch.object(MicrobatchModel, "loss", loss)


def divide_by_rank_targets() -> AbstractContextManager[Any]:
    """Counts the targets of a rank's own sequences only."""
    return mock.patch.object(step, "targets_per_sequence", _of_rank)


def _of_rank(targets_BS: Tensor) -> Tensor:
    return (targets_BS != IGNORE).sum().clamp(min=1) / len(targets_BS)


def update_bias_on_rank_0() -> AbstractContextManager[Any]:
    """Updates the balancing bias on the first rank only."""

    def update(model: nn.Module, total_counts_LE: Tensor, rate: float) -> None:
        if dist.get_rank() == 0:
            update_bias(model, total_counts_LE, rate)

    return mock.patch.object(step, "update_bias", update)


def balance_each_microbatch() -> AbstractContextManager[Any]:
    """Takes all of a microbatch for one sequence, whose balance loss is then averaged over microbatches."""

    def number_sequences(shape: torch.Size, _documents: Tensor | None, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return mock.patch.object(microbatch, "number_sequences", number_sequences)
