"""A microbatch through the decoder: forward pass and losses, as every rank trains on it. Needs no Composer.

Shapes: B sequences of a microbatch, S tokens per sequence, L layers, E experts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from train.model.context import Context
from train.model.decoder import Ahead, Decoder, DecoderOutput, targets_ahead
from train.model.moe import MoE, balance_loss, by_sequence
from train.model.pipeline import FORWARD, Pipeline, Receipt
from train.model.router import Jitter
from train.model.router_noise import noise_key
from train.recipe import sizes
from train.recipe.schema import Balance, Precision, Recipe

Batch = dict[str, Tensor]


def split(batch: Batch, sequences: int) -> list[Batch]:
    """Returns a batch's microbatches of so many sequences, in order."""
    rows = range(0, len(batch["input_ids"]), sequences)
    return [{key: value[row : row + sequences] for key, value in batch.items()} for row in rows]


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
        self.by_sequence = moe is not None and by_sequence(moe)
        self.mixtures = [module for module in decoder.modules() if isinstance(module, MoE)]
        self.jitters = moe is not None and moe.jitter_eps > 0
        self.expert_layers = expert_layers_of(decoder)
        """Which of all MoE layers this rank has, those of each of its parts of the model."""
        self.experts = moe.experts if moe is not None else 0
        self.all_expert_layers = sizes.expert_layers(recipe.model)
        self.precision = precision
        self.document_masking = recipe.training.document_masking
        self.targets_per_sequence: Tensor | None = None
        """Mean over the batch of all ranks, by which losses are divided; None: every position counts."""

    def forward(self, batch: Batch) -> DecoderOutput:
        """Returns the losses of a microbatch of input_ids, document_ids and targets, each [B, S].

        Where ranks share sequences all of them get the whole, and each returns the losses of its part.
        """
        if self.decoder.pipeline is None:
            return self._decode(batch)
        return self._pass_on(batch)

    @property
    def context(self) -> Context | None:
        """The ranks that share the sequences of a microbatch; in evaluation every rank has its own."""
        return self.decoder.context if self.decoder.training else None

    def _own(self, x_BS: Tensor) -> Tensor:
        """Returns what this rank computes of whole sequences."""
        return x_BS if self.context is None else self.context.part(x_BS)

    @torch.no_grad()
    def count_choices(self, batch: Batch) -> Tensor:
        """Returns a microbatch's tokens per expert, [L, E], without computing logits or loss.

        Of a pipeline's stage L are all MoE layers, and those of others have none.
        """
        if self.decoder.pipeline is None:
            return self._decode(batch, choices_only=True).expert_tokens_LE
        return self._pass_on(batch, choices_only=True).expert_tokens_LE

    def _pass_on(self, batch: Batch, choices_only: bool = False) -> DecoderOutput:
        """Takes a microbatch through all stages of the pipeline, without gradients; each returns its own."""
        pipeline = self.decoder.pipeline
        assert pipeline is not None
        outputs = []
        for chunk, part in enumerate(self.decoder.parts):
            arrived_BSD = None
            if not part.is_first:
                arrived_BSD = self.receive(pipeline, batch, FORWARD).wait()
            outputs.append(self.run_part(batch, chunk, arrived_BSD, choices_only))
            if not part.is_last:
                self.send(pipeline, outputs[-1])
        pipeline.finish()
        return self.together(outputs, batch)

    def receive(self, pipeline: Pipeline, batch: Batch, direction: int) -> Receipt:
        """Begins to receive the residual stream of a microbatch, or its gradient."""
        dtype = torch.bfloat16 if self.precision is Precision.bf16 else torch.float32
        like = torch.empty(0, dtype=dtype, device=batch["input_ids"].device)
        sequences, length = batch["input_ids"].shape
        own = length // (1 if self.context is None else self.context.ranks)
        shape = (sequences, own, self.decoder.cfg.d_model)
        return pipeline.receive(shape, like, direction)

    def send(self, pipeline: Pipeline, outputs: DecoderOutput) -> None:
        """Sends the residual stream of a microbatch to the next stage."""
        assert outputs.hidden_BSD is not None
        pipeline.send(outputs.hidden_BSD, FORWARD)

    def run_part(
        self, batch: Batch, chunk: int, arrived_BSD: Tensor | None, choices_only: bool = False
    ) -> DecoderOutput:
        """Runs a part of the model that this rank has on a microbatch."""
        return self._decode(batch, choices_only, chunk, arrived_BSD)

    def together(self, outputs: Sequence[DecoderOutput], batch: Batch) -> DecoderOutput:
        """Returns what a microbatch left on this rank, without gradients, of all its parts of the model.

        Counts are those of all MoE layers, 0 of other stages'; losses of tokens are 0 if this stage has none.
        """
        last = outputs[-1]
        counts_LE = last.expert_tokens_LE
        if self.all_expert_layers:
            counts_LE = counts_LE.new_zeros(self.all_expert_layers, self.experts)
            for layers, each in zip(self.expert_layers, outputs, strict=True):
                # In evaluation without that of multi-token prediction, which is the last.
                if own := layers[: len(each.expert_tokens_LE)]:
                    counts_LE[own] = each.expert_tokens_LE
        losses_BS = last.token_losses_BS
        if losses_BS is None:
            losses_BS = torch.zeros_like(self._own(batch["targets"]), dtype=torch.float32)
        return last._replace(
            expert_tokens_LE=counts_LE,
            token_losses_BS=losses_BS,
            loss_sum=last.loss_sum.detach(),
            hidden_BSD=None,
        )

    def prepare(self, batch: Batch) -> None:
        """Tells layers what they need to know of a microbatch besides tokens, for any pass of it.

        Recomputation reads it too: of microbatches that are in flight together each has to be told again
        before its backward pass.
        """
        device, (_, length) = batch["input_ids"].device, batch["input_ids"].shape
        context = self.context
        place_S = None if context is None else context.places(length, device)
        if self.jitters:
            numbers = (layer for layers in self.expert_layers for layer in layers)
            for layer, mixture in zip(numbers, self.mixtures, strict=True):
                key = noise_key(self.seed, layer, device)
                mixture.router.jitter = Jitter(key, batch["sample_positions"], place_S)
        document_ids_BS = batch["document_ids"] if self.document_masking else None
        if self.by_sequence:
            sequence_BS = number_sequences(batch["input_ids"].shape, document_ids_BS, device)
            for mixture in self.mixtures:
                mixture.sequence_T, mixture.first_B = self._own(sequence_BS).flatten(), sequence_BS[:, 0]
                mixture.context = context

    def _decode(
        self,
        batch: Batch,
        choices_only: bool = False,
        chunk: int = 0,
        arrived_BSD: Tensor | None = None,
    ) -> DecoderOutput:
        self.prepare(batch)
        device, context = batch["input_ids"].device, self.context
        document_ids_BS = batch["document_ids"] if self.document_masking else None
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
                chunk=chunk,
                arrived_BSD=arrived_BSD,
            )
        return outputs

    def loss(
        self, outputs: DecoderOutput, batch: Batch, *_: Any, chunk: int = 0, **__: Any
    ) -> dict[str, Tensor]:
        """Returns the losses of a microbatch; the backward pass starts from `total`.

        Of a part of the model they are its share: those of all parts add up to the model's.

        The summed token loss is divided by the number of positions, or by the microbatch's share of the
        targets of the global batch: numbers in which it has no say, so that the mean over microbatches and
        ranks is the mean over the global batch however it is split. Ranks that share sequences divide by
        their equal shares of it.
        """
        sequences, length = batch["targets"].shape
        per_sequence = length - 1 if self.targets_per_sequence is None else self.targets_per_sequence
        positions = sequences * per_sequence / (1 if self.context is None else self.context.ranks)
        layers = self.expert_layers[chunk]
        share = len(layers) / self.all_expert_layers if self.all_expert_layers else 1.0
        minimised = language = outputs.loss_sum / positions
        others = {}
        if self.logit_z_weight:
            if outputs.token_losses_BS is not None:
                language = outputs.token_losses_BS.sum() / positions
            others["logit_z"] = (minimised.detach() - language) / self.logit_z_weight
        counts_LE = outputs.expert_tokens_LE
        if self.reduce_counts is not None:
            counts_LE = self.reduce_counts(counts_LE)
            if len(counts_LE) != len(layers):  # those of all layers
                counts_LE = counts_LE[layers]
        elif self.context is not None and counts_LE.numel() and not self.by_sequence:
            counts_LE = self.context.sum(counts_LE)
        balance = outputs.sequence_balance
        if not self.by_sequence:
            balance = balance_loss(outputs.mean_scores_LE, counts_LE)
        # Both are means over layers.
        z_loss = outputs.z_loss
        if share != 1:
            balance, z_loss = balance * share, z_loss * share
        total = minimised + self.balance_weight * balance + self.z_weight * z_loss
        if self.mtp_weight is not None:
            others["mtp"] = outputs.mtp_loss_sum / positions
            total = total + self.mtp_weight * others["mtp"]
        return {
            "total": total,
            "language": language,
            "balance": balance,
            "z": z_loss,
            **others,
        }


def expert_layers_of(decoder: Decoder) -> list[list[int]]:
    """Returns the numbers, among all MoE layers, of those of each part of the model that a rank has."""
    model = decoder.cfg
    numbers: dict[int, int] = {}
    for layer in range(sizes.layers(model)):
        if sizes.has_experts(model, layer):
            numbers[layer] = len(numbers)
    found = [[numbers[layer] for layer in part.layers if layer in numbers] for part in decoder.parts]
    if model.mtp and decoder.parts[-1].is_last and model.n_layers in numbers:
        found[-1].append(numbers[model.n_layers])
    return found


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
