"""Causal self-attention: grouped queries, RoPE or ALiBi, and document masking.

Shapes: B batch, S new positions, P past positions, H query heads, G key-value heads, R width of a head,
D model, N = H + 2 G heads of all kinds, T = B x S tokens.
"""

# ruff: noqa: N815  (shape suffixes)

import functools
import inspect
import math
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from train.cpu import attention as cpu_attention
from train.cpu.dispatch import with_cpu_version
from train.model.context import Context
from train.model.documents import Documents, Reach, document_reach
from train.model.largest_logits import LargestLogits, Sight
from train.model.norms import RmsNorm
from train.model.recompute import remade
from train.model.tensor_parallel import ColumnLinear, RowLinear
from train.recipe import sizes
from train.recipe.schema import Model, Position, QkNormOver, Recompute, Yarn

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of the past positions, each [B, G, P, R]; keys are already rotated.

Latent attention keeps other tensors in their place, see :mod:`train.model.latent_attention`."""


class DocumentKernel(Enum):
    """A kernel that keeps packed documents apart."""

    bias = "bias"
    """A bias of S x S, added to the logits."""
    flex = "flex"
    """FlexAttention, whose mask of blocks skips what is masked fully."""
    varlen = "varlen"
    """A kernel that takes each document as a sequence of its own, and needs no mask."""


class AttentionPlan(NamedTuple):
    """Positions and masks that all layers share in one forward pass; see :func:`plan_attention`."""

    cos_SR: Tensor | None
    """Cosines of RoPE's angles, for half of what is rotated of a head: [S, R / 2]. None: no RoPE."""
    sin_SR: Tensor | None
    bias: Tensor | None = None
    """Added to attention's logits: [B or 1, H or 1, S, P + S], -inf where masked. None: plain causal."""
    blocks: BlockMask | None = None
    """The same mask for FlexAttention, which skips fully masked blocks."""
    documents: Documents | None = None
    """The documents that a kernel of variable length takes one by one."""
    context: Context | None = None
    """The ranks that share the sequences, whose keys and values are gathered. None: this rank has all."""
    reach: Reach | None = None
    """The keys of `documents`, where ranks share sequences."""
    sight: Sight | None = None
    """The keys that each query sees, where the largest logits are watched."""


def plan_attention(
    model: Model,
    batch: int,
    length: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    document_ids_BS: Tensor | None = None,
    past_length: int = 0,
    kernel: DocumentKernel | None = None,
    context: Context | None = None,
) -> AttentionPlan:
    """Builds positions and masks for one batch.

    Args:
        model: the recipe's model.
        batch: sequences B.
        length: new positions S.
        device: where attention runs.
        dtype: precision of the queries and the bias.
        document_ids_BS: document of each token of the whole sequences; None if each sequence is one document.
        past_length: past positions P, whose keys and values the layers receive.
        kernel: what keeps documents apart; None: what suits the device, see :func:`document_kernel`.
        context: the ranks that share the sequences, of which this one has S tokens of each; None: no others.
    """
    whole = past_length + length * (1 if context is None else context.ranks)
    query_S = torch.arange(past_length, whole, device=device)
    if context is not None:
        query_S = context.places(whole, device)
        if document_ids_BS is None:
            document_ids_BS = torch.zeros(batch, whole, dtype=torch.int32, device=device)
    cos_SR = sin_SR = None
    if model.position is Position.rope:
        # Cast to the queries' precision here: FSDP2 casts a layer's inputs to bf16 in the forward pass but
        # not in recomputation (torch before 2.13), and both must save the same tensors.
        cos_SR, sin_SR = (table.to(dtype) for table in _rotations(model, query_S))
    alibi = model.position is Position.alibi
    if document_ids_BS is None and not alibi and (past_length == 0 or length == 1):
        return AttentionPlan(cos_SR, sin_SR)
    if document_ids_BS is not None and not alibi:
        kernel = kernel or document_kernel(model, device, dtype)
        if kernel is DocumentKernel.varlen:
            if context is not None:
                reach = document_reach(document_ids_BS, context)
                return AttentionPlan(cos_SR, sin_SR, documents=reach.queries, context=context, reach=reach)
            return AttentionPlan(cos_SR, sin_SR, documents=document_offsets(document_ids_BS))
        if kernel is DocumentKernel.flex:
            blocks = document_blocks(document_ids_BS, None if context is None else query_S)
            return AttentionPlan(cos_SR, sin_SR, blocks=blocks, context=context)
    distance_SP = query_S[:, None] - torch.arange(whole, device=device)[None, :]
    visible = (distance_SP >= 0)[None, None]
    if document_ids_BS is not None:
        assert past_length == 0, "documents are packed only in training, which has no past positions"
        own_BS = document_ids_BS if context is None else context.part(document_ids_BS)
        visible = visible & (own_BS[:, None, :, None] == document_ids_BS[:, None, None, :])
    bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -math.inf)
    if alibi:
        slopes_H = _alibi_slopes(model.n_heads).to(device)
        bias = bias - (slopes_H[:, None, None] * distance_SP).to(dtype)
    return AttentionPlan(cos_SR, sin_SR, bias, context=context)


def sight_of(
    length: int, document_ids_BS: Tensor | None, device: torch.device, context: Context | None = None
) -> Sight:
    """Returns the keys that each query sees, without past positions.

    Args:
        length: new positions S, of each rank that shares the sequences.
        document_ids_BS: document of each token of the whole sequences; None if each is one document.
        device: where attention runs.
        context: the ranks that share the sequences; None: no others.
    """
    if context is None:
        place_S = torch.arange(length, device=device)
        return Sight(place_S, is_part=False, own_BS=document_ids_BS, document_BP=document_ids_BS)
    place_S = context.places(length * context.ranks, device)
    own_BS = None if document_ids_BS is None else context.part(document_ids_BS)
    return Sight(place_S, is_part=True, own_BS=own_BS, document_BP=document_ids_BS)


class Attention(nn.Module):
    """Attention of one layer. The rows of ``Wqkv`` are queries, keys, values, as in Hugging Face's DBRX."""

    def __init__(self, model: Model, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.model = model
        self.heads = (model.n_heads, model.n_kv_heads, model.n_kv_heads)
        self.head_width = sizes.head_width(model)
        rows = sum(self.heads) * self.head_width
        self.Wqkv = ColumnLinear(model.d_model, rows, bias=model.qkv_bias, device=device)
        self.q_norm = self.k_norm = None
        if model.qk_norm:
            widths = sizes.qk_norm_widths(model)
            self.q_norm, self.k_norm = (RmsNorm(w, eps=model.norm_eps, device=device) for w in widths)
        self.out_proj = RowLinear(sizes.query_width(model), model.d_model, bias=False, device=device)
        self.logits: LargestLogits | None = None
        """Watches the logits of plans that have a `sight`."""

    def forward(
        self, x_BSD: Tensor, plan: AttentionPlan, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attends from the new positions to the past ones and themselves.

        Returns:
            The output [B, S, D], and the keys and values of all positions, for later calls.
        """
        qkv_BSNR = self.Wqkv(x_BSD).unflatten(-1, (-1, self.head_width))
        if self.Wqkv.sharing is not None:
            qkv_BSNR = self.Wqkv.sharing.exchange_heads(qkv_BSNR, self.heads)
        if self.model.clip_qkv is None and not self.model.qk_norm:
            # Nothing keeps qkv, and what is made of it is no more than that.
            q_BSHR, k_BSGR, v_BSGR = self._split(qkv_BSNR, plan.cos_SR, plan.sin_SR)
        else:
            q_BSHR, k_BSGR, v_BSGR = remade(
                Recompute.elementwise, self._split, qkv_BSNR, plan.cos_SR, plan.sin_SR
            )
        if plan.context is not None:
            k_BSGR, v_BSGR = plan.context.gather(k_BSGR, v_BSGR)
        if self.logits is not None and plan.sight is not None:
            self.logits.see(q_BSHR, k_BSGR, plan.sight, self.head_width**-0.5)
        q_BHSR, k_BGSR, v_BGSR = (t.transpose(1, 2) for t in (q_BSHR, k_BSGR, v_BSGR))
        if plan.documents is not None:
            q_THR, k_TGR, v_TGR = (part.flatten(0, 1) for part in (q_BSHR, k_BSGR, v_BSGR))
            keys = None
            if plan.reach is not None:
                k_TGR, v_TGR = (within(part, plan.reach) for part in (k_BSGR, v_BSGR))
                keys = plan.reach.keys
            out_THR = document_attention(q_THR, k_TGR, v_TGR, *plan.documents, keys=keys)
            return self.out_proj(out_THR.reshape(*q_BSHR.shape[:2], -1)), (k_BGSR, v_BGSR)
        if past is not None:
            k_BGSR, v_BGSR = torch.cat([past[0], k_BGSR], dim=2), torch.cat([past[1], v_BGSR], dim=2)
        if plan.blocks is None:
            is_causal = plan.bias is None and past is None
            out_BHSR = dot_product_attention(q_BHSR, k_BGSR, v_BGSR, plan.bias, is_causal)
        else:
            out_BHSR = block_attention(q_BHSR, k_BGSR, v_BGSR, plan.blocks)
        return self.out_proj(out_BHSR.transpose(1, 2).flatten(2)), (k_BGSR, v_BGSR)

    def _split(
        self, qkv_BSNR: Tensor, cos_SR: Tensor | None, sin_SR: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values as attention takes them."""
        return clip_and_rotate(self._normalize(qkv_BSNR), self.own_heads, self.model.clip_qkv, cos_SR, sin_SR)

    @property
    def own_heads(self) -> tuple[int, int, int]:
        """The query, key and value heads that this rank attends with."""
        group, (queries, keys, values) = self.Wqkv.sharing, self.heads
        ranks = 1 if group is None else group.ranks
        return queries // ranks, keys // ranks, values // ranks

    def _normalize(self, qkv_BSNR: Tensor) -> Tensor:
        """Normalises queries and keys if the model has QK norm."""
        if self.q_norm is None or self.k_norm is None:
            return qkv_BSNR
        q, k, v = qkv_BSNR.split(self.own_heads, dim=2)
        if self.model.qk_norm_over is QkNormOver.all_heads:
            q, k = (
                norm(part.flatten(2)).view_as(part) for norm, part in ((self.q_norm, q), (self.k_norm, k))
            )
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        return torch.cat([q.to(v.dtype), k.to(v.dtype), v], dim=2)


@with_cpu_version(cpu_attention.clip_and_rotate)
def clip_and_rotate(
    qkv_BSNR: Tensor,
    heads: tuple[int, int, int],
    clip: float | None,
    cos_SR: Tensor | None,
    sin_SR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits queries, keys and values, clips them, and rotates queries and keys by their positions.

    Args:
        qkv_BSNR: all heads, N = H + 2 G.
        heads: H query heads, G key heads, G value heads.
        clip: bound on absolute values, or None. A value at the bound has no gradient.
        cos_SR: cosines of RoPE's angles; None: no RoPE.
        sin_SR: sines of RoPE's angles; None: no RoPE.

    Returns:
        Queries [B, S, H, R], keys and values [B, S, G, R], each contiguous.
    """
    q, k, v = qkv_BSNR.split(heads, dim=2)
    if clip is not None:
        q, k, v = (functional.hardtanh(part, -clip, clip) for part in (q, k, v))
    if cos_SR is not None and sin_SR is not None:
        q, k = (rotate(part, cos_SR, sin_SR) for part in (q, k))
    # A view would keep all of qkv alive until the backward pass.
    return q.contiguous(), k.contiguous(), v.contiguous()


def rotate(x_BSHR: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Rotates each pair (r, r + R / 2) of a head by its position's angle (Su et al. 2021, section 3.4.2).

    Args:
        x_BSHR: queries or keys.
        cos_SR: cosines of the angles, [S, R / 2]; if there are fewer, only a head's first elements turn.
        sin_SR: their sines.
    """
    width = 2 * cos_SR.shape[-1]
    if width < x_BSHR.shape[-1]:
        return torch.cat([rotate(x_BSHR[..., :width], cos_SR, sin_SR), x_BSHR[..., width:]], dim=-1)
    left, right = x_BSHR.chunk(2, dim=-1)
    cos, sin = (table_SR.to(x_BSHR.dtype).unsqueeze(1) for table_SR in (cos_SR, sin_SR))
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def dot_product_attention(
    q_BHSR: Tensor,
    k_BGSR: Tensor,
    v_BGSR: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention in one fused kernel: [B, H, S, R]. Logits are divided by sqrt(R), or multiplied by ``scale``.

    Only flash attention on a GPU supports grouped key-value heads. For other kernels the heads are repeated:
    with grouped heads they would leave the fused path, which takes three times as long on a CPU.
    """
    shares_heads = q_BHSR.is_cuda and can_use_flash_attention(
        SDPAParams(q_BHSR, k_BGSR, v_BGSR, bias, 0.0, is_causal, True)
    )
    if not shares_heads:
        k_BGSR, v_BGSR = (_repeat_heads(part, q_BHSR.shape[1]) for part in (k_BGSR, v_BGSR))
    return functional.scaled_dot_product_attention(
        q_BHSR, k_BGSR, v_BGSR, attn_mask=bias, is_causal=is_causal, enable_gqa=shares_heads, scale=scale
    )


def document_kernel(model: Model, device: torch.device, dtype: torch.dtype) -> DocumentKernel:
    """Returns the kernel for packed documents.

    On a GPU that is the kernel of variable length where torch has it (from 2.15) and it takes the model.
    """
    if device.type != "cuda":
        return DocumentKernel.bias
    is_taken = dtype in (torch.bfloat16, torch.float16) and sizes.head_width(model) % 8 == 0
    if is_taken and has_varlen():
        return DocumentKernel.varlen
    return DocumentKernel.flex


@functools.cache
def has_varlen() -> bool:
    """Returns whether torch has attention of variable length that takes grouped heads; imports Dynamo."""
    try:
        from torch.nn.attention import varlen  # type: ignore[attr-defined, unused-ignore]
    except ImportError:  # torch before 2.10
        return False
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def document_offsets(document_ids_BS: Tensor) -> Documents:
    """Finds where documents begin; the host waits once, for a copy. Sequences never share a document."""
    on_host_BS = document_ids_BS.cpu()
    begins_BS = functional.pad(on_host_BS[:, 1:] != on_host_BS[:, :-1], (1, 0), value=True)
    starts_N = begins_BS.flatten().nonzero().flatten()
    offsets = functional.pad(starts_N, (0, 1), value=begins_BS.numel())
    longest = int(offsets.diff().max())
    return Documents(offsets.int().to(document_ids_BS.device, non_blocking=True), longest)


def within(x_BPGR: Tensor, reach: Reach) -> Tensor:
    """Returns the rows of keys or values that a rank's chunks attend to, [T, G, R]."""
    return torch.cat([x_BPGR[sequence, begin:end] for sequence, begin, end in reach.spans])


@with_cpu_version(cpu_attention.document_attention)
def document_attention(
    q_THR: Tensor,
    k_TGR: Tensor,
    v_TGR: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float | None = None,
    keys: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Causal attention within each of :class:`Documents`, by the kernel of variable length: [T, H, R].

    Args:
        q_THR: queries.
        k_TGR: keys.
        v_TGR: values.
        offsets: of the documents of the queries.
        longest: tokens of the longest of them.
        scale: of the scores; None: the root of a head's width, inverted.
        keys: offsets and longest of the keys' documents, whose last tokens the queries are; None: the same.
    """
    from torch.nn.attention import varlen  # type: ignore[attr-defined, unused-ignore]

    key_offsets, longest_keys = keys or (offsets, longest)
    out = varlen.varlen_attn(
        # The same tensor twice: some backends take causal attention only so.
        *(q_THR, k_TGR, v_TGR, offsets, key_offsets, longest, longest_keys),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=q_THR.shape[1] != k_TGR.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def document_blocks(document_ids_BS: Tensor, query_Q: Tensor | None = None) -> BlockMask:
    """Returns the causal mask of packed documents, for :func:`block_attention`.

    Args:
        document_ids_BS: document of each token, which are the keys.
        query_Q: places of the queries; None: those of all tokens.
    """

    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if query_Q is not None:
            query = query_Q[query]
        same_document = document_ids_BS[batch, query] == document_ids_BS[batch, key]
        return (query >= key) & same_document

    batch, length = document_ids_BS.shape
    device = document_ids_BS.device
    # Uncompiled, the full mask would be built before it is cut into blocks.
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    queries = length if query_Q is None else len(query_Q)
    return make(visible, batch, None, queries, length, device=str(device))


@with_cpu_version(cpu_attention.block_attention)
def block_attention(
    q_BHSR: Tensor, k_BGSR: Tensor, v_BGSR: Tensor, blocks: BlockMask, scale: float | None = None
) -> Tensor:
    """Attention with FlexAttention's mask, in one kernel that skips fully masked blocks: [B, H, S, R]."""
    out: Tensor = _compiled_flex_attention()(
        q_BHSR, k_BGSR, v_BGSR, block_mask=blocks, enable_gqa=True, scale=scale
    )
    return out


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _rotations(model: Model, place_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles in fp32, each [S, R / 2] (Su et al. 2021, section 3.2.2), for the R
    elements of a head that are rotated.

    With YaRN they are multiplied by its attention factor, which scales queries and keys; latent attention
    scales them itself, as not all of them are rotated.
    """
    width = sizes.rotated_width(model)
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=place_S.device).float() / width
    positions_S = place_S.float()
    wavelengths_R = model.rope_theta**exponents
    if model.yarn is None:
        angles_SR = positions_S[:, None] / wavelengths_R
        return angles_SR.cos(), angles_SR.sin()
    angles_SR = positions_S[:, None] * _yarn_frequencies(model.yarn, model.rope_theta, wavelengths_R)
    scale = 1.0 if model.latent else yarn_scale(model.yarn)
    return angles_SR.cos() * scale, angles_SR.sin() * scale


def yarn_scale(yarn: Yarn) -> float:
    """Returns the factor by which YaRN multiplies queries and keys (Peng et al. 2023, eq. 22)."""
    return yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1


def _yarn_frequencies(yarn: Yarn, theta: float, wavelengths_R: Tensor) -> Tensor:
    """Frequencies of YaRN (Peng et al. 2023, section 3.2), with its ramp over dimensions as in transformers.

    Args:
        yarn: the recipe's settings.
        theta: RoPE's base.
        wavelengths_R: RoPE's wavelengths over 2 pi, [R / 2], which start with 1.
    """
    pairs = len(wavelengths_R)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(yarn.original_tokens / (2 * math.pi * times)) / math.log(theta)

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), 2 * pairs - 1)
    ramp_R = torch.arange(pairs, dtype=torch.float32, device=wavelengths_R.device)
    stretched_R = ((ramp_R - first) / ((last - first) or 1e-3)).clamp(0, 1)
    return stretched_R / (yarn.factor * wavelengths_R) + (1 - stretched_R) / wavelengths_R


def _repeat_heads(x_BGSR: Tensor, heads: int) -> Tensor:
    """Repeats each key-value head for the query heads that share it."""
    batch, kv_heads, length, width = x_BGSR.shape
    if kv_heads == heads:
        return x_BGSR
    expanded = x_BGSR.unsqueeze(2).expand(batch, kv_heads, heads // kv_heads, length, width)
    return expanded.reshape(batch, heads, length, width)


def _alibi_slopes(heads: int) -> Tensor:
    """Slopes of the heads in ALiBi's order, a geometric series (Press et al. 2021, section 3)."""
    power = 2 ** math.ceil(math.log2(heads))
    series = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return torch.tensor((series[1::2] + series[::2])[:heads] if power != heads else series)
