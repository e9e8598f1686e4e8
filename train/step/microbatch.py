"""A microbatch through the decoder: forward pass and losses, as every rank trains on it. Needs no Composer.

Shapes: B sequences of a microbatch, S tokens per sequence, L layers, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from train.model.decoder import Decoder, DecoderOutput
from train.model.moe import balance_loss
from train.model.router import Jitter, Router
from train.model.router_noise import noise_key
from train.recipe.schema import Balance, Precision, Recipe

Batch = dict[str, Tensor]


class MicrobatchModel(nn.Module):
    """The decoder with the losses that a recipe trains it on.

    ``reduce_counts`` turns a microbatch's tokens per expert into those that its balance loss uses, both
    [L, E]; None: the same.

    Args:
        decoder: on its device, sharded already where it is.
        recipe: of the run: weights of the losses, jitter, document masking.
        precision: of the matrix products.
    """

    def __init__(self, decoder: Decoder, recipe: Recipe, precision: Precision) -> None:
        super().__init__()
        self.decoder = decoder
        moe = recipe.model.moe
        by_loss = moe is not None and moe.balance is Balance.loss
        self.reduce_counts: Callable[[Tensor], Tensor] | None = None
        self.balance_weight = moe.balance_loss_weight if moe and by_loss else 0.0
        self.logit_z_weight = recipe.model.logit_z_loss_weight
        self.z_weight = moe.z_loss_weight if moe else 0.0
        self.seed = recipe.seed
        routers = [module for module in decoder.modules() if isinstance(module, Router)]
        self.jittered = routers if moe and moe.jitter_eps > 0 else []
        self.precision = precision
        self.document_masking = recipe.training.document_masking

    def forward(self, batch: Batch) -> DecoderOutput:
        """Returns the losses of a microbatch of input_ids, document_ids and targets, each [B, S]."""
        return self._decode(batch)

    @torch.no_grad()
    def count_choices(self, batch: Batch) -> Tensor:
        """Returns a microbatch's tokens per expert, [L, E], without computing logits or loss."""
        return self._decode(batch, choices_only=True).expert_tokens_LE

    def _decode(self, batch: Batch, choices_only: bool = False) -> DecoderOutput:
        device = batch["input_ids"].device
        for layer, router in enumerate(self.jittered):
            router.jitter = Jitter(noise_key(self.seed, layer, device), batch["sample_positions"])
        # Weights stay fp32; autocast makes the bf16 copies for matrix products.
        cast: AbstractContextManager[Any] = torch.autocast(
            device.type, torch.bfloat16, enabled=self.precision is Precision.bf16
        )
        with cast:
            outputs: DecoderOutput = self.decoder(
                batch["input_ids"],
                batch["document_ids"] if self.document_masking else None,
                batch["targets"],
                choices_only=choices_only,
            )
        return outputs

    def loss(self, outputs: DecoderOutput, batch: Batch, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Returns the losses of a microbatch; the backward pass starts from `total`.

        The summed token loss is divided by the number of positions, a constant, so that the mean over
        microbatches and ranks is the mean over the global batch however it is split.
        """
        sequences, length = batch["targets"].shape
        positions = sequences * (length - 1)
        minimised = language = outputs.loss_sum / positions
        of_logits = {}
        if self.logit_z_weight:
            assert outputs.token_losses_BS is not None, "training has targets"
            language = outputs.token_losses_BS.sum() / positions
            of_logits["logit_z"] = (minimised.detach() - language) / self.logit_z_weight
        counts_LE = outputs.expert_tokens_LE
        if self.reduce_counts is not None:
            counts_LE = self.reduce_counts(counts_LE)
        balance = balance_loss(outputs.mean_scores_LE, counts_LE)
        total = minimised + self.balance_weight * balance + self.z_weight * outputs.z_loss
        return {
            "total": total,
            "language": language,
            "balance": balance,
            "z": outputs.z_loss,
            **of_logits,
        }
