"""The decoder: DBRX's architecture with Hugging Face's parameter names, and its dense relatives.

Shapes: B batch, S sequence, T = B x S tokens, D model, F hidden, V vocabulary, L layers with experts,
E experts.
"""

# ruff: noqa: N815  (shape suffixes)

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model.attention import Attention, AttentionPlan, DocumentKernel, plan_attention, sight_of
from train.model.context import Context
from train.model.experts import Experts
from train.model.interleave import Halves, interleaved, plan_halves
from train.model.largest_logits import LargestLogits
from train.model.latent_attention import LatentAttention
from train.model.loss import IGNORE, chunked_cross_entropy
from train.model.moe import MoE, MoEAux, balance_loss
from train.model.norms import make_norm
from train.model.offload import HostMemory, LayerInputs
from train.model.pipeline import Pipeline
from train.model.recompute import remade, run_ffn, run_layer
from train.model.tensor_parallel import ColumnLinear, RowLinear, TensorGroup, column_products
from train.recipe import sizes
from train.recipe.pipeline import ModelPart, cut
from train.recipe.schema import ExpertPrecision, Ffn, Model, Recompute

Device = torch.device | str | None


class DecoderOutput(NamedTuple):
    """Outputs of a forward pass. Losses are unweighted sums or means: the trainer weights them."""

    logits_BSV: Tensor | None
    """Only without targets."""
    loss_sum: Tensor
    """fp32: cross-entropy in nats, summed over targets that are not -100; 0 without targets. In training it
    includes the logits' weighted z-loss."""
    target_tokens: Tensor
    """int64: number of targets that are not -100."""
    token_losses_BS: Tensor | None
    """fp32, detached: each token's cross-entropy, 0 where the target is -100."""
    mean_scores_LE: Tensor
    """fp32: each expert's mean score; [0, 0] for a dense model."""
    z_loss: Tensor
    """fp32: mean over MoE layers; 0 for a dense model."""
    expert_tokens_LE: Tensor
    """int64: tokens per layer and expert on this rank; [0, 0] for a dense model."""
    sequence_balance: Tensor
    """fp32: balance loss of each sequence, mean over MoE layers; 0 for other balance scopes, and not in
    training."""
    mtp_loss_sum: Tensor
    """fp32: cross-entropy of the tokens after the next ones, summed like `loss_sum`; 0 without multi-token
    prediction, and not in training. Its layer's losses and counts are the last of the MoE layers'."""
    hidden_BSD: Tensor | None = None
    """Only of a part of the model that is not the last: the residual stream, for the next. Losses of tokens
    are 0 then, and the MoE layers' those of the part."""

    @property
    def balance_loss(self) -> Tensor:
        """Balance loss with the counts of this call; 0 for a dense model."""
        return balance_loss(self.mean_scores_LE, self.expert_tokens_LE)


class Elsewhere(nn.Module):
    """Stands for a layer, or what is outside the layers, that another stage of the pipeline has."""


class Ahead(NamedTuple):
    """A rank's part of what multi-token prediction reads further on, where ranks share sequences."""

    next_ids_BS: Tensor
    """Each position's next token."""
    targets_BS: Tensor
    """See :func:`targets_ahead`."""


class DenseFfn(nn.Module):
    """``w2(silu(w1 x) * v1 x)`` (Shazeer 2020), or ``w2 gelu(w1 x)`` for MPT."""

    def __init__(self, model: Model, device: Device = None) -> None:
        super().__init__()
        self.w1 = ColumnLinear(model.d_model, model.ffn_hidden_size, bias=False, device=device)
        if model.ffn is Ffn.glu:
            self.v1 = ColumnLinear(model.d_model, model.ffn_hidden_size, bias=False, device=device)
        self.w2 = RowLinear(model.ffn_hidden_size, model.d_model, bias=False, device=device)
        self.gated = model.ffn is Ffn.glu

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, None]:
        """Returns the layer's output, and None in place of an MoE layer's losses and counts."""
        return self.w2(remade(Recompute.gates, self._hidden, x_BSD)), None

    def _hidden(self, x_BSD: Tensor) -> Tensor:
        again = Recompute.elementwise
        if not self.gated:
            return remade(again, functional.gelu, self.w1(x_BSD))
        gate_BSF, up_BSF = column_products(x_BSD, self.w1, self.v1)
        return remade(again, torch.mul, remade(again, functional.silu, gate_BSF), up_BSF)


class NormAttentionNorm(nn.Module):
    """The attention half of a block, a separate module only to match DBRX's parameter names."""

    def __init__(self, model: Model, device: Device = None) -> None:
        super().__init__()
        self.norm_1 = make_norm(model, device)
        self.attn = LatentAttention(model, device) if model.latent else Attention(model, device)
        self.norm_2 = make_norm(model, device)

    def forward(self, x_BSD: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Returns the residual stream after attention, and its normalised copy for the feed-forward layer."""
        attended_BSD, _ = self.attn(remade(Recompute.elementwise, self.norm_1, x_BSD), plan)
        x_BSD = x_BSD + attended_BSD
        return x_BSD, remade(Recompute.elementwise, self.norm_2, x_BSD)


class Block(nn.Module):
    """One transformer layer, counted from 0: attention, then a dense or an MoE feed-forward layer."""

    def __init__(self, model: Model, layer: int, device: Device = None) -> None:
        super().__init__()
        self.norm_attn_norm = NormAttentionNorm(model, device)
        self.ffn: nn.Module
        if model.moe is None or not sizes.has_experts(model, layer):
            self.ffn = DenseFfn(model, device)
        else:
            self.ffn = MoE(model.d_model, model.ffn_hidden_size, model.moe, device)

    def forward(self, x_BSD: Tensor, plan: AttentionPlan | Halves) -> tuple[Tensor, MoEAux | None]:
        """Returns the residual stream after the layer, and the MoE's losses and counts."""
        if isinstance(plan, Halves):
            if isinstance(self.ffn, MoE):
                return interleaved(self.norm_attn_norm, self.ffn, x_BSD, plan)
            halves = zip(x_BSD.chunk(2), plan, strict=True)
            return torch.cat([self._whole(half_BSD, its_plan)[0] for half_BSD, its_plan in halves]), None
        return self._whole(x_BSD, plan)

    def _whole(self, x_BSD: Tensor, plan: AttentionPlan) -> tuple[Tensor, MoEAux | None]:
        x_BSD, normed_BSD = self.norm_attn_norm(x_BSD, plan)
        out_BSD, aux = run_ffn(self.ffn, normed_BSD)
        return x_BSD + out_BSD, aux


class MultiTokenPrediction(Block):
    """A layer that predicts the token after the next one (DeepSeek-V3, section 2.2, of depth 1).

    Names, and the order of the two halves that are joined, are those of DeepSeek-V3's published weights.
    Embedding and output projection are the decoder's.
    """

    def __init__(self, model: Model, device: Device = None) -> None:
        super().__init__(model, model.n_layers, device)
        self.enorm, self.hnorm = make_norm(model, device), make_norm(model, device)
        self.eh_proj = nn.Linear(2 * model.d_model, model.d_model, bias=False, device=device)
        self.norm = make_norm(model, device)

    def forward(  # type: ignore[override]
        self, hidden_BSD: Tensor, next_BSD: Tensor, plan: AttentionPlan | Halves
    ) -> tuple[Tensor, MoEAux | None]:
        """Runs the layer.

        Args:
            hidden_BSD: what the decoder's output projection reads.
            next_BSD: each position's next token's embedding.
            plan: attention's.

        Returns:
            Hidden states [B, S, D] for the output projection, and the MoE's losses and counts.
        """
        joined = remade(Recompute.elementwise, self._join, hidden_BSD, next_BSD)
        # In the residual stream's precision, as in other layers.
        x_BSD, aux = super().forward(self.eh_proj(joined).to(hidden_BSD.dtype), plan)
        return self.norm(x_BSD), aux

    def _join(self, hidden_BSD: Tensor, next_BSD: Tensor) -> Tensor:
        return torch.cat([self.enorm(next_BSD), self.hnorm(hidden_BSD)], dim=-1)


def targets_ahead(
    targets_BS: Tensor, document_ids_BS: Tensor | None, continues_BS: Tensor | None = None
) -> Tensor:
    """Returns the token after the next one of each position, or IGNORE.

    There is none where that token is no target, where the next one is not known, nor, if documents are kept
    apart, where either is of another document.

    Args:
        targets_BS: next tokens, or IGNORE.
        document_ids_BS: document of each token, if documents are kept apart.
        continues_BS: where a next token is known, target or not. None: where it is a target.
    """
    ahead_BS = targets_BS.roll(-1, dims=1)
    ahead_BS[:, -1] = IGNORE
    is_none_BS = targets_BS == IGNORE if continues_BS is None else ~continues_BS
    if document_ids_BS is not None:
        is_none_BS[:, :-2] |= document_ids_BS[:, :-2] != document_ids_BS[:, 2:]
        is_none_BS[:, -2:] = True  # their targets' documents are not known
    return ahead_BS.masked_fill(is_none_BS, IGNORE)


class Transformer(nn.Module):
    """Embedding, layers and final norm, and in training the layer of multi-token prediction."""

    def __init__(
        self, model: Model, device: Device, recompute: Sequence[Recompute], parts: Sequence[ModelPart]
    ) -> None:
        super().__init__()
        self.model, self.parts = model, parts
        self.recompute = recompute
        # Only a router's jitter draws random numbers, if it has no key.
        self.draws = model.moe is not None and model.moe.jitter_eps > 0
        self.interleave = False
        """In training, compute layers in halves: see :mod:`train.model.interleave`."""
        self.offload: HostMemory | None = None
        """Where inputs of layers that are computed again are kept in training; None: where they are."""
        self.watches_logits = False
        """In training, attention looks for its largest logits: see :mod:`train.model.largest_logits`."""
        self.document_kernel: DocumentKernel | None = None
        """The kernel that keeps packed documents apart; None: the one that suits the device."""
        own = {layer for part in parts for layer in part.layers}
        self.wte: nn.Module = Elsewhere()
        if sizes.has_embedding(model, parts):
            self.wte = nn.Embedding(model.vocab_size, model.d_model, device=device)
        self.blocks = nn.ModuleList(
            Block(model, layer, device) if layer in own else Elsewhere() for layer in range(model.n_layers)
        )
        self.norm_f = make_norm(model, device) if parts[-1].is_last else Elsewhere()
        self.mtp = MultiTokenPrediction(model, device) if model.mtp and parts[-1].is_last else None

    @property
    def layers(self) -> list[Block]:
        """All layers that this rank has; that of multi-token prediction is the last."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return blocks if self.mtp is None else [*blocks, self.mtp]

    @property
    def runs(self) -> list[list[Block]]:
        """The same, those of each part of the model."""
        found: list[list[Block]] = []
        for part in self.parts:
            blocks = (self.blocks[layer] for layer in part.layers)
            found.append([block for block in blocks if isinstance(block, Block)])
        if self.mtp is not None:
            found[-1].append(self.mtp)
        return found

    def forward(
        self,
        ids_BS: Tensor,
        document_ids_BS: Tensor | None,
        context: Context | None = None,
        next_ids_BS: Tensor | None = None,
        chunk: int = 0,
        arrived_BSD: Tensor | None = None,
    ) -> tuple[Tensor, list[MoEAux], Tensor | None]:
        """Runs the layers, those of a part of the model where there are several.

        Returns:
            Hidden states [B, S, D], of a part that is not the last the residual stream, each MoE layer's
            losses and counts, and in training the hidden states of multi-token prediction.
        """
        part = self.parts[chunk]
        x_BSD = embedded_BSD = self.wte(ids_BS) if arrived_BSD is None else arrived_BSD
        device = x_BSD.device
        autocast = torch.is_autocast_enabled(device.type)
        # Attention is of whole sequences where ranks share them by heads.
        splits_heads = isinstance(context, TensorGroup)
        length = ids_BS.shape[1] * (context.ranks if isinstance(context, TensorGroup) else 1)

        def plan_of(sequences: int, documents: Tensor | None) -> AttentionPlan:
            plan = plan_attention(
                self.model,
                sequences,
                length,
                device=device,
                dtype=torch.get_autocast_dtype(device.type) if autocast else x_BSD.dtype,
                document_ids_BS=documents,
                kernel=self.document_kernel,
                context=None if splits_heads else context,
            )
            if not (self.watches_logits and self.training):
                return plan
            return plan._replace(sight=sight_of(length, documents, device, None if splits_heads else context))

        is_halved = self.interleave and self.training and len(ids_BS) % 2 == 0
        make_plan = functools.partial(plan_halves, plan_of) if is_halved else plan_of
        plan = make_plan(len(ids_BS), document_ids_BS)
        away = LayerInputs(self.offload, device) if self.offload and self.training else None
        layers: list[MoEAux] = []
        for layer in part.layers:
            block, how = self.blocks[layer], self.recompute[layer]
            x_BSD, aux = run_layer(how, block, x_BSD, plan, draws=self.draws, away=away)
            if aux is not None:
                layers.append(aux)
        if not part.is_last:
            return x_BSD, layers, None
        hidden_BSD = self.norm_f(x_BSD)
        if self.mtp is None or not self.training:
            return hidden_BSD, layers, None
        # The last position's next token is unknown; it has no target either, and no other position sees it.
        if next_ids_BS is None and arrived_BSD is not None:
            next_ids_BS = ids_BS.roll(-1, dims=1)
        next_BSD = embedded_BSD.roll(-1, dims=1) if next_ids_BS is None else self.wte(next_ids_BS)
        inputs = (hidden_BSD, next_BSD, plan)
        ahead_BSD, aux = run_layer(self.recompute[len(self.blocks)], self.mtp, *inputs, draws=self.draws)
        return hidden_BSD, layers if aux is None else [*layers, aux], ahead_BSD


class LanguageModelHead(nn.Linear):
    """The output projection. It computes the loss too, since a sharded weight is gathered only inside it."""

    def forward(  # type: ignore[override]
        self,
        hidden_TD: Tensor,
        targets_T: Tensor | None = None,
        chunk_tokens: int | None = None,
        z_weight: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logits [T, V], or with targets the summed loss and each token's loss."""
        return _project(hidden_TD, self.weight, targets_T, chunk_tokens, z_weight)


class Decoder(nn.Module):
    """A decoder language model.

    Args:
        cfg: the recipe's model.
        device: where weights are created, uninitialised; ``meta`` allocates nothing.
        recompute: what each layer computes again in the backward pass; one grade for all, or one for each.
        loss_chunk_tokens: tokens whose logits are held in memory at once; None: what suits the device.
        parts: the parts of the model that this rank has; None: all of it, in one.
    """

    def __init__(
        self,
        cfg: Model,
        *,
        device: Device = None,
        recompute: Recompute | Sequence[Recompute] = Recompute.nothing,
        loss_chunk_tokens: int | None = None,
        parts: Sequence[ModelPart] | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.parts = cfg, cut([cfg.n_layers]) if parts is None else parts
        self.loss_chunk_tokens = loss_chunk_tokens
        self.context: Context | None = None
        """The ranks that share sequences in training, each of which is given its part. None: no others."""
        self.pipeline: Pipeline | None = None
        """The stages of which this rank's parts of the model are one. None: it has all of it."""
        self.largest_logit: Tensor | None = None
        """fp32: attention's largest logit in the last batch, of all ranks, where heads are clipped."""
        each = [recompute] * sizes.layers(cfg) if isinstance(recompute, Recompute) else recompute
        self.transformer = Transformer(cfg, device, each, self.parts)
        self.lm_head: LanguageModelHead | None = None
        if not cfg.tie_embeddings and self.parts[-1].is_last:
            self.lm_head = LanguageModelHead(cfg.d_model, cfg.vocab_size, bias=False, device=device)

    @property
    def layer_numbers(self) -> list[int]:
        """The numbers, in the whole model, of the layers that this rank has, in their order."""
        own = sorted(layer for part in self.parts for layer in part.layers)
        return own if self.transformer.mtp is None else [*own, self.cfg.n_layers]

    @property
    def shared_embedding(self) -> nn.Parameter | None:
        """The embedding, on the first and the last stage of a pipeline if both have it; else None."""
        wte = self.transformer.wte
        if self.pipeline is None or not sizes.embeds_twice(self.cfg) or not isinstance(wte, nn.Embedding):
            return None
        assert isinstance(wte.weight, nn.Parameter)
        return wte.weight

    def set_expert_precision(self, precision: ExpertPrecision) -> None:
        """Sets the precision of the experts' products, in training and in its evaluations."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.precision = precision

    def set_offload(self, offload: bool) -> None:
        """Sets whether inputs of layers that are computed again wait in host memory, as they are."""
        self.transformer.offload = HostMemory() if offload else None

    def watch_logits(self) -> list[Attention | LatentAttention]:
        """Makes attention look for its largest logits in training; returns that of each layer."""
        self.transformer.watches_logits = True
        found = [module for module in self.modules() if isinstance(module, Attention | LatentAttention)]
        for attention in found:
            attention.logits = LargestLogits()
        return found

    def forget_logits(self) -> None:
        """Begins to look for the largest logits of a batch."""
        for module in self.modules():
            if isinstance(module, Attention | LatentAttention) and module.logits is not None:
                module.logits.forget()

    def set_recompute(self, grades: Sequence[Recompute]) -> None:
        """Sets what each layer recomputes from the next batch on; no gradient depends on it."""
        self.transformer.recompute = grades

    def set_rope_theta(self, theta: float) -> None:
        """Sets RoPE's base from the next batch on; no weight depends on it."""
        self.cfg = self.transformer.model = dataclasses.replace(self.cfg, rope_theta=theta)

    def forward(
        self,
        input_ids_BS: Tensor,
        document_ids_BS: Tensor | None = None,
        targets_BS: Tensor | None = None,
        choices_only: bool = False,
        context: Context | None = None,
        continues_BS: Tensor | None = None,
        ahead: Ahead | None = None,
        chunk: int = 0,
        arrived_BSD: Tensor | None = None,
    ) -> DecoderOutput:
        """Computes logits, or with targets the losses; of a part of the model that is not the last neither.

        Args:
            input_ids_BS: token ids.
            document_ids_BS: document of each token; tokens see only their own document. None: one document.
            targets_BS: the token that follows each input, -100 where there is no loss.
            choices_only: compute only the experts' counts, neither logits nor cross-entropy.
            context: the ranks that share the sequences: inputs and targets are this one's part of them,
                documents those of all tokens. None: every sequence is whole.
            continues_BS: for multi-token prediction, where a token follows, though it may be no target. None:
                where it is one.
            ahead: for multi-token prediction where ranks share sequences, since a part ends before them.
            chunk: which of this rank's parts to run.
            arrived_BSD: what the part before it returned; None: it is the first.
        """
        next_ids_BS = None if ahead is None else ahead.next_ids_BS
        inputs = (input_ids_BS, document_ids_BS, context, next_ids_BS, chunk, arrived_BSD)
        hidden_BSD, layers, ahead_BSD = self.transformer(*inputs)
        zero = torch.zeros((), dtype=torch.float32, device=hidden_BSD.device)
        experts = (zero.new_zeros((0, 0)), zero, zero.new_zeros((0, 0), dtype=torch.int64), zero)
        if layers:
            scores, z, tokens, sequences = zip(*layers, strict=True)
            of_sequences = zero if sequences[0] is None else torch.stack(sequences).mean()
            experts = (torch.stack(scores), torch.stack(z).mean(), torch.stack(tokens), of_sequences)
        if not self.parts[chunk].is_last:
            return DecoderOutput(None, zero, zero.long(), None, *experts, zero, hidden_BSD)
        if choices_only:
            return DecoderOutput(None, zero, zero.long(), None, *experts, zero)
        result = self._project(hidden_BSD, targets_BS, self.cfg.logit_z_loss_weight if self.training else 0.0)
        if targets_BS is None:
            assert isinstance(result, Tensor)
            logits_BSV = result.view(*input_ids_BS.shape, -1)
            return DecoderOutput(logits_BSV, zero, zero.long(), None, *experts, zero)
        loss_sum, losses_T = result
        of_ahead = zero
        if ahead_BSD is not None:
            if ahead is None:
                ahead_BS = targets_ahead(targets_BS, document_ids_BS, continues_BS)
            else:
                ahead_BS = ahead.targets_BS
            of_ahead, _ = self._project(ahead_BSD, ahead_BS)
        target_tokens = (targets_BS != IGNORE).sum()
        losses_BS = losses_T.view_as(targets_BS)
        return DecoderOutput(None, loss_sum, target_tokens, losses_BS, *experts, of_ahead)

    def _project(
        self, hidden_BSD: Tensor, targets_BS: Tensor | None, z_weight: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logits [T, V], or with targets the summed loss and each token's loss."""
        targets_T = None if targets_BS is None else targets_BS.flatten()
        hidden_TD, of_loss = hidden_BSD.flatten(0, 1), (self.loss_chunk_tokens, z_weight)
        if self.lm_head is None:
            weight_VD = self.transformer.wte.weight
            assert isinstance(weight_VD, Tensor)
            return _project(hidden_TD, weight_VD, targets_T, *of_loss)
        result: Tensor | tuple[Tensor, Tensor] = self.lm_head(hidden_TD, targets_T, *of_loss)
        return result


def _project(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor | None, chunk_tokens: int | None, z_weight: float
) -> Tensor | tuple[Tensor, Tensor]:
    if targets_T is None:
        return functional.linear(hidden_TD, weight_VD)
    return chunked_cross_entropy(hidden_TD, weight_VD, targets_T, chunk_tokens, z_weight)
