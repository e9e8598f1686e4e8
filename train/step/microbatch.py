"""A microbatch through the decoder: forward pass and losses, as every rank trains on it. Needs no Composer.

Shapes: B sequences of a microbatch, S tokens per sequence, L layers, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from train.model.context import Context
from train.model.decoder import Ahead, Decoder, DecoderOutput, targets_ahead
from train.model.moe import MoE, balance_loss, by_sequence
from train.model.router import Jitter, Router
from train.model.router_noise import noise_key
from train.recipe.schema import Balance, Precision, Recipe

Batch = dict[str, Tensor]


class MicrobatchModel(nn.Module):
    """The decoder with the losses that a recipe trains it on.

    ``reduce_counts`` turns a microbatch's tokens per expert into those that its balance loss uses, both
    [L, E]; None: the same, of all ranks that share its sequences.

    Args:
        decoder: on its device, sharded already where it is.
        recipe: of the run: weights of the losses, jitter, document masking.
        precision: of the matrix products.
    """

    def __init__(self, decoder: Decoder, recipe: Recipe, precision: Precision) -> None:
        super().__init__()
        self.decoder = decoder
        decoder.set_expert_precision(recipe.training.expert_precision)
        decoder.set_offload(recipe.training.offload)
        moe = recipe.model.moe
        by_loss = moe is not None and moe.balance is not Balance.bias
        self.reduce_counts: Callable[[Tensor], Tensor] | None = None
        self.balance_weight = moe.balance_loss_weight if moe and by_loss else 0.0
        self.logit_z_weight = recipe.model.logit_z_loss_weight
        self.z_weight = moe.z_loss_weight if moe else 0.0
        self.mtp_weight = recipe.model.mtp_loss_weight if recipe.model.mtp else None
        self.seed = recipe.seed
        routers = [module for module in decoder.modules() if isinstance(module, Router)]
        self.by_sequence = moe is not None and by_sequence(moe)
        self.mixtures = [module for module in decoder.modules() if isinstance(module, MoE)]
        self.jittered = routers if moe and moe.jitter_eps > 0 else []
        self.precision = precision
        self.document_masking = recipe.training.document_masking
        self.targets_per_sequence: Tensor | None = None
        """Mean over the batch of all ranks, by which losses are divided; None: every position counts."""

    def forward(self, batch: Batch) -> DecoderOutput:
        """Returns the losses of a microbatch of input_ids, document_ids and targets, each [B, S].

        Where ranks share sequences all of them get the whole, and each returns the losses of its part.
        """
        return self._decode(batch)

    @property
    def context(self) -> Context | None:
        """The ranks that share the sequences of a microbatch; in evaluation every rank has its own."""
        return self.decoder.context if self.decoder.training else None

    def _own(self, x_BS: Tensor) -> Tensor:
        """Returns what this rank computes of whole sequences."""
        return x_BS if self.context is None else self.context.part(x_BS)

    @torch.no_grad()
    def count_choices(self, batch: Batch) -> Tensor:
        """Returns a microbatch's tokens per expert, [L, E], without computing logits or loss."""
        return self._decode(batch, choices_only=True).expert_tokens_LE

    def _decode(self, batch: Batch, choices_only: bool = False) -> DecoderOutput:
        device, (_, length) = batch["input_ids"].device, batch["input_ids"].shape
        context = self.context
        place_S = None if context is None else context.places(length, device)
        for layer, router in enumerate(self.jittered):
            key = noise_key(self.seed, layer, device)
            router.jitter = Jitter(key, batch["sample_positions"], place_S)
        document_ids_BS = batch["document_ids"] if self.document_masking else None
        if self.by_sequence:
            sequence_BS = number_sequences(batch["input_ids"].shape, document_ids_BS, device)
            for mixture in self.mixtures:
                mixture.sequence_T, mixture.first_B = self._own(sequence_BS).flatten(), sequence_BS[:, 0]
                mixture.context = context
        ahead = None
        if context is not None and self.mtp_weight is not None:
            next_BS = batch["input_ids"].roll(-1, dims=1)
            ahead_BS = targets_ahead(batch["targets"], document_ids_BS, batch.get("continues"))
            ahead = Ahead(self._own(next_BS), self._own(ahead_BS))
        # Weights stay fp32; autocast makes the bf16 copies for matrix products.
        cast: AbstractContextManager[Any] = torch.autocast(
            device.type, torch.bfloat16, enabled=self.precision is Precision.bf16
        )
        with cast:
            outputs: DecoderOutput = self.decoder(
                self._own(batch["input_ids"]),
                document_ids_BS,
                # Of whole sequences: the target of a part's last token is in the next part.
                self._own(batch["targets"]),
                choices_only=choices_only,
                context=context,
                continues_BS=batch.get("continues"),
                ahead=ahead,
            )
        return outputs

    def loss(self, outputs: DecoderOutput, batch: Batch, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Returns the losses of a microbatch; the backward pass starts from `total`.

        The summed token loss is divided by the number of positions, or by the microbatch's share of the
        targets of the global batch: numbers in which it has no say, so that the mean over microbatches and
        ranks is the mean over the global batch however it is split. Ranks that share sequences divide by
        their equal shares of it.
        """
        sequences, length = batch["targets"].shape
        per_sequence = length - 1 if self.targets_per_sequence is None else self.targets_per_sequence
        positions = sequences * per_sequence / (1 if self.context is None else self.context.ranks)
        minimised = language = outputs.loss_sum / positions
        others = {}
        if self.logit_z_weight:
            assert outputs.token_losses_BS is not None, "training has targets"
            language = outputs.token_losses_BS.sum() / positions
            others["logit_z"] = (minimised.detach() - language) / self.logit_z_weight
        counts_LE = outputs.expert_tokens_LE
        if self.reduce_counts is not None:
            counts_LE = self.reduce_counts(counts_LE)
        elif self.context is not None and counts_LE.numel() and not self.by_sequence:
            counts_LE = self.context.sum(counts_LE)
        balance = outputs.sequence_balance
        if not self.by_sequence:
            balance = balance_loss(outputs.mean_scores_LE, counts_LE)
        total = minimised + self.balance_weight * balance + self.z_weight * outputs.z_loss
        if self.mtp_weight is not None:
            others["mtp"] = outputs.mtp_loss_sum / positions
            total = total + self.mtp_weight * others["mtp"]
        return {
            "total": total,
            "language": language,
            "balance": balance,
            "z": outputs.z_loss,
            **others,
        }


def number_sequences(shape: torch.Size, document_ids_BS: Tensor | None, device: torch.device) -> Tensor:
    """Numbers what a microbatch consists of, from 0: int64 [B, S], rising.

    Args:
        shape: B and S.
        document_ids_BS: document of each token, if they are kept apart: each row's are numbered one by one.
            None: every row is one sequence.
        device: of the numbers.
    """
    begins_BS = torch.zeros(shape, dtype=torch.bool, device=device)
    begins_BS[:, 0] = True
    if document_ids_BS is not None:
        begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    return begins_BS.flatten().cumsum(dim=0).view(shape) - 1
