"""Clipping and rotation on CPUs, with hand-written gradients, against the plain operations."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from train.cpu import attention as cpu_attention
from train.model.attention import clip_and_rotate, document_blocks

BATCH, LENGTH, HEADS, WIDTH = 2, 7, (4, 2, 2), 8
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles_SR = torch.arange(LENGTH)[:, None] * 0.3 ** torch.arange(WIDTH // 2)
    return angles_SR.cos().to(dtype), angles_SR.sin().to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("clip", [None, 0.75])
@pytest.mark.parametrize("rope", [False, True])
def test_output_and_gradient_equal_the_plain_operations(
    dtype: torch.dtype, clip: float | None, rope: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(BATCH, LENGTH, sum(HEADS), WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    qkv[0, 0, 0, :2] = torch.tensor([0.75, -0.75])  # at the bounds, where the gradient is ambiguous
    qkv.requires_grad_()
    cos_SR, sin_SR = tables(dtype) if rope else (None, None)
    results = []
    for function in (cpu_attention.clip_and_rotate, clip_and_rotate.plain):
        parts = function(qkv, HEADS, clip, cos_SR, sin_SR)
        assert [part.shape[2] for part in parts] == list(HEADS)
        assert all(part.is_contiguous() for part in parts)
        weights = [torch.linspace(-1, 1, part.numel()).view(part.shape).to(dtype) for part in parts]
        results.append([*parts, *torch.autograd.grad(parts, qkv, weights)])
    tolerance = TOLERANCES[dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradient_equals_finite_differences() -> None:
    qkv = torch.randn(1, LENGTH, sum(HEADS), WIDTH, dtype=torch.float64, requires_grad=True)
    angles = tables(torch.float64)
    assert torch.autograd.gradcheck(lambda x: cpu_attention.clip_and_rotate(x, HEADS, 0.75, *angles), qkv)


def test_attention_takes_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_and_rotate, "plain", None)
    parts = clip_and_rotate(torch.ones(1, 1, sum(HEADS), WIDTH), HEADS, 0.5, None, None)
    assert all(part.eq(0.5).all() for part in parts)


def test_blocks_are_those_of_flex_attention() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(BATCH, heads, LENGTH, WIDTH, generator=generator) for heads in HEADS)
    blocks = document_blocks(torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]]))
    ours = cpu_attention.block_attention(q, k, v, blocks)
    torch.testing.assert_close(ours, flex_attention(q, k, v, block_mask=blocks, enable_gqa=True))
