"""Attention on a CPU: splitting, clipping and rotation in one operation, and a GPU's kernels for documents.

As separate operations the former take as long on a CPU as the projection before them.

Shapes: B batch, S positions, H heads of one part, G key-value heads, N heads of all parts, R width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_mask


def clip_and_rotate(
    qkv_BSNR: Tensor,
    heads: tuple[int, int, int],
    clip: float | None,
    cos_SR: Tensor | None,
    sin_SR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`train.model.attention.clip_and_rotate` with a hand-written gradient."""
    result: tuple[Tensor, Tensor, Tensor] = _ClipAndRotate.apply(qkv_BSNR, heads, clip, cos_SR, sin_SR)
    return result


class _ClipAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        heads: tuple[int, int, int],
        clip: float | None,
        cos_SR: Tensor | None,
        sin_SR: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.heads, ctx.clip, ctx.with_rope = heads, clip, cos_SR is not None
        ctx.save_for_backward(qkv if clip is not None else None, cos_SR, sin_SR)
        clipped = qkv if clip is None else qkv.clamp(-clip, clip)
        parts = clipped.split(heads, dim=2)
        turned = [part.new_empty(part.shape) for part in parts]
        for i, (part, target) in enumerate(zip(parts, turned, strict=True)):
            if cos_SR is not None and sin_SR is not None and i < 2:
                _rotate(part, cos_SR, sin_SR, out=target)
            else:
                target.copy_(part)
        return tuple(turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos_SR, sin_SR = ctx.saved_tensors
        batch, length, _, width = grads[0].shape
        grad_qkv = grads[0].new_empty(batch, length, sum(ctx.heads), width)
        for i, (grad, target) in enumerate(zip(grads, grad_qkv.split(ctx.heads, dim=2), strict=True)):
            if ctx.with_rope and i < 2:
                _rotate(grad, cos_SR, -sin_SR, out=target)
            else:
                target.copy_(grad)
        if ctx.clip is not None:
            # The gradient of clipping in one pass; clamp's own takes four.
            torch.ops.aten.hardtanh_backward.grad_input(
                grad_qkv, qkv, -ctx.clip, ctx.clip, grad_input=grad_qkv
            )
        return grad_qkv, None, None, None, None


def _rotate(x_BSHR: Tensor, cos_SR: Tensor, sin_SR: Tensor, out: Tensor) -> None:
    """Rotates each pair (r, r + R / 2) of a head by its position's angle, written to ``out``.

    Of fewer angles than half a head, the elements after those that turn are copied.
    """
    width = 2 * cos_SR.shape[-1]
    if width < x_BSHR.shape[-1]:
        out[..., width:].copy_(x_BSHR[..., width:])
        x_BSHR, out = x_BSHR[..., :width], out[..., :width]
    left, right = x_BSHR.chunk(2, dim=-1)
    out_left, out_right = out.chunk(2, dim=-1)
    cos, sin = (table_SR.to(x_BSHR.dtype).unsqueeze(1) for table_SR in (cos_SR, sin_SR))
    torch.mul(left, cos, out=out_left)
    out_left.addcmul_(right, sin, value=-1.0)
    torch.mul(right, cos, out=out_right)
    out_right.addcmul_(left, sin)


def block_attention(
    q_BHSR: Tensor, k_BGSR: Tensor, v_BGSR: Tensor, blocks: BlockMask, scale: float | None = None
) -> Tensor:
    """:func:`train.model.attention.block_attention` with the whole S x S mask.

    On a CPU only tests ask for blocks; torch 2.15's FlexAttention has no gradient there.
    """
    (batch, _, length, _), device = q_BHSR.shape, str(q_BHSR.device)
    visible = create_mask(blocks.mask_mod, batch, None, length, k_BGSR.shape[2], device=device)
    return functional.scaled_dot_product_attention(
        q_BHSR, k_BGSR, v_BGSR, visible, enable_gqa=True, scale=scale
    )


def document_attention(
    q_THR: Tensor,
    k_TGR: Tensor,
    v_TGR: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float | None = None,
    keys: tuple[Tensor, int] | None = None,
) -> Tensor:
    """:func:`train.model.attention.document_attention`, document by document; only tests ask for it here."""
    of_queries = offsets.diff().tolist()
    of_keys = of_queries if keys is None else keys[0].diff().tolist()
    parts = zip(
        *(
            part.transpose(0, 1).split(spans, dim=1)
            for part, spans in ((q_THR, of_queries), (k_TGR, of_keys), (v_TGR, of_keys))
        ),
        strict=True,
    )
    outs = []
    for q, k, v in parts:
        # The last query sees all keys, the one before it all but the last.
        shape = q.shape[1], k.shape[1]
        visible = torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])
        outs.append(functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True, scale=scale))
    return torch.cat(outs, dim=1).transpose(0, 1)
