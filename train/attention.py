"""Causal self-attention: grouped queries, RoPE or ALiBi, and documents that do not see each other.

Shapes: B batch, S new positions, P past positions, H query heads, G key-value heads, R width of a head,
D = H x R model, T = B x S tokens.
"""

# ruff: noqa: N815  (shape suffixes)

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.schema import Model, Position

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of the positions so far, each [B, G, P, R], keys already rotated."""


class AttentionPlan(NamedTuple):
    """What all layers share in one forward pass: made once, by :func:`plan_attention`."""

    cos_SR: Tensor | None
    sin_SR: Tensor | None
    bias: Tensor | None
    """Added to attention's logits: [B or 1, H or 1, S, P + S], -inf where not visible. None: plain causal."""


def plan_attention(
    model: Model,
    batch: int,
    length: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    document_ids_BS: Tensor | None = None,
    past_length: int = 0,
) -> AttentionPlan:
    """Positions and visibility for one batch.

    Args:
        model: the recipe's model.
        batch: sequences B.
        length: new positions S.
        device: where attention runs.
        dtype: precision of the queries, and so of the bias.
        document_ids_BS: document of each token; None where a sequence is one document.
        past_length: positions P whose keys and values are given to the layers.
    """
    cos_SR = sin_SR = None
    if model.position is Position.rope:
        cos_SR, sin_SR = _rotations(model, past_length, length, device)
    causal_only = document_ids_BS is None and model.position is not Position.alibi
    if causal_only and (past_length == 0 or length == 1):
        return AttentionPlan(cos_SR, sin_SR, None)
    query_S = torch.arange(past_length, past_length + length, device=device)
    key_P = torch.arange(past_length + length, device=device)
    distance_SP = query_S[:, None] - key_P[None, :]
    visible = (distance_SP >= 0)[None, None]
    if document_ids_BS is not None:
        assert past_length == 0, "documents are packed for training, where nothing is past"
        visible = visible & (document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :])
    bias = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -math.inf)
    if model.position is Position.alibi:
        slopes_H = _alibi_slopes(model.n_heads).to(device)
        bias = bias - (slopes_H[:, None, None] * distance_SP).to(dtype)
    return AttentionPlan(cos_SR, sin_SR, bias)


class Attention(nn.Module):
    """Attention of one layer. Rows of ``Wqkv`` are queries, keys, values, as in Hugging Face's DBRX."""

    def __init__(self, model: Model, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.model = model
        self.head_width = model.d_model // model.n_heads
        rows = (model.n_heads + 2 * model.n_kv_heads) * self.head_width
        self.Wqkv = nn.Linear(model.d_model, rows, bias=False, device=device)
        self.out_proj = nn.Linear(model.d_model, model.d_model, bias=False, device=device)

    def forward(
        self, x_BSD: Tensor, plan: AttentionPlan, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attends from the new positions to the past ones and themselves.

        Returns:
            The output [B, S, D], and the keys and values of all positions for a later call.
        """
        batch, length, _ = x_BSD.shape
        heads, kv_heads = self.model.n_heads, self.model.n_kv_heads
        qkv = self.Wqkv(x_BSD)
        if self.model.clip_qkv is not None:
            qkv = qkv.clamp(-self.model.clip_qkv, self.model.clip_qkv)
        qkv = qkv.view(batch, length, heads + 2 * kv_heads, self.head_width)
        qk, v_BSGR = qkv.split([heads + kv_heads, kv_heads], dim=2)
        if plan.cos_SR is not None and plan.sin_SR is not None:
            qk = _rotate(qk, plan.cos_SR, plan.sin_SR)
        q_BHSR, k_BGSR = qk.transpose(1, 2).split([heads, kv_heads], dim=1)
        v_BGSR = v_BSGR.transpose(1, 2)
        if past is not None:
            k_BGSR, v_BGSR = torch.cat([past[0], k_BGSR], dim=2), torch.cat([past[1], v_BGSR], dim=2)
        out_BHSR = functional.scaled_dot_product_attention(
            q_BHSR,
            _repeat_heads(k_BGSR, heads),
            _repeat_heads(v_BGSR, heads),
            attn_mask=plan.bias,
            is_causal=plan.bias is None and past is None,
        )
        out_BSD = out_BHSR.transpose(1, 2).reshape(batch, length, -1)
        return self.out_proj(out_BSD), (k_BGSR, v_BGSR)


def _rotations(model: Model, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles in fp32, each [S, R] (Su et al. 2021, section 3.2.2)."""
    width = model.d_model // model.n_heads
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    frequencies = 1.0 / (model.rope_theta**exponents)
    positions_S = torch.arange(start, start + length, device=device).float()
    angles = positions_S[:, None] * frequencies[None, :]
    angles_SR = torch.cat([angles, angles], dim=-1)
    return angles_SR.cos(), angles_SR.sin()


def _rotate(x_BSHR: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Turns each pair (r, r + R / 2) of a head by its position's angle."""
    left, right = x_BSHR.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    cos_S1R, sin_S1R = cos_SR.to(x_BSHR.dtype).unsqueeze(1), sin_SR.to(x_BSHR.dtype).unsqueeze(1)
    return x_BSHR * cos_S1R + turned * sin_S1R


def _repeat_heads(x_BGSR: Tensor, heads: int) -> Tensor:
    """Each key-value head for all the query heads that share it."""
    batch, kv_heads, length, width = x_BGSR.shape
    if kv_heads == heads:
        return x_BGSR
    expanded = x_BGSR.unsqueeze(2).expand(batch, kv_heads, heads // kv_heads, length, width)
    return expanded.reshape(batch, heads, length, width)


def _alibi_slopes(heads: int) -> Tensor:
    """Slope per head: a geometric series (Press et al. 2021, section 3), as ALiBi orders them."""
    power = 2 ** math.ceil(math.log2(heads))
    series = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return torch.tensor((series[1::2] + series[::2])[:heads] if power != heads else series)
