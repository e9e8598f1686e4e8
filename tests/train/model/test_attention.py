"""Attention against its definition: positions, shared key-value heads, clipping, documents, the KV cache."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train.hf.config import llama_from_model
from train.model.attention import Attention, DocumentKernel, document_offsets, plan_attention
from train.model.init import initialize
from train.recipe.schema import Model, Position, QkNormOver, Yarn

# Shapes: B batch, S sequence, H query heads, G key-value heads, R width of a head, D model.
B, S, H, R = 2, 12, 4, 8
BASE = Model(
    d_model=H * R,
    n_layers=1,
    n_heads=H,
    n_kv_heads=2,
    ffn_hidden_size=8,
    vocab_size=8,
    max_sequence_tokens=S,
    init_std=0.3,
)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [7] * 12])


def make(model: Model = BASE) -> Attention:
    attention = Attention(model, "cpu")
    initialize(attention, model, seed=1)
    if model.qkv_bias:
        with torch.no_grad():
            assert not attention.Wqkv.bias.any()
            attention.Wqkv.bias.normal_(generator=torch.Generator().manual_seed(2))
    return attention.double()


def inputs(length: int = S) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, length, H * R, generator=generator, dtype=torch.float64, requires_grad=True)


def attend(attention: Attention, x_BSD: Tensor, **plan: Tensor | DocumentKernel | None) -> Tensor:
    shared = plan_attention(attention.model, *x_BSD.shape[:2], device=x_BSD.device, dtype=x_BSD.dtype, **plan)
    return attention(x_BSD, shared)[0]


def normed(norm: torch.nn.RMSNorm, x_BSN: Tensor) -> Tensor:
    """RMS norm of as many consecutive elements as the norm's weight has."""
    (width,) = norm.normalized_shape
    parts = x_BSN.unflatten(-1, (-1, width))
    parts = parts / (parts.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()  # type: ignore[operator]
    return (parts * norm.weight).flatten(2)


def definition(attention: Attention, x_BSD: Tensor, visible_BSS: Tensor) -> Tensor:
    """Attention token by token: RoPE as a product of complex numbers, scores, softmax, values."""
    model, R = attention.model, attention.head_width
    qkv = attention.Wqkv(x_BSD)
    if model.qk_norm:
        assert attention.q_norm is not None and attention.k_norm is not None
        q, k, v = qkv.split([H * R, model.n_kv_heads * R, model.n_kv_heads * R], dim=-1)
        qkv = torch.cat([normed(attention.q_norm, q), normed(attention.k_norm, k), v], dim=-1)
    if model.clip_qkv is not None:
        qkv = qkv.clamp(-model.clip_qkv, model.clip_qkv)
    q, k, v = qkv.split([H * R, model.n_kv_heads * R, model.n_kv_heads * R], dim=-1)

    def heads(rows: Tensor, turned: bool) -> Tensor:
        rows = rows.view(*rows.shape[:2], -1, R).transpose(1, 2)
        if turned and model.position is Position.rope:
            W = round(R * model.rope_share)
            angles = torch.arange(rows.shape[2])[:, None] * model.rope_theta ** -(torch.arange(0, W, 2) / W)
            pairs = torch.complex(rows[..., : W // 2], rows[..., W // 2 : W]) * torch.exp(1j * angles)
            rows = torch.cat([pairs.real, pairs.imag, rows[..., W:]], dim=-1)
        return rows.repeat_interleave(H // rows.shape[1], dim=1)

    scores = heads(q, True) @ heads(k, True).transpose(-1, -2) / math.sqrt(R)
    if model.position is Position.alibi:
        distance = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
        scores = scores - torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * distance
    shares = scores.masked_fill(~visible_BSS[:, None], -math.inf).softmax(dim=-1)
    return attention.out_proj((shares @ heads(v, False)).transpose(1, 2).flatten(2))


MODELS = {
    "rope": BASE,
    "one key-value head": replace(BASE, n_kv_heads=1),
    "as many key-value heads": replace(BASE, n_kv_heads=H),
    "clipped": replace(BASE, clip_qkv=0.7),
    "wide heads": replace(BASE, head_width=12),
    "narrow heads": replace(BASE, head_width=6),
    "normalised over all heads": replace(BASE, qk_norm=True),
    "normalised over each head": replace(
        BASE, head_width=12, clip_qkv=0.7, qk_norm=True, qk_norm_over=QkNormOver.each_head
    ),
    "rotated in part, with biases": replace(BASE, rope_share=0.5, qkv_bias=True, clip_qkv=0.7),
    "alibi": replace(BASE, position=Position.alibi),
    "alibi, clipped": replace(BASE, position=Position.alibi, clip_qkv=0.7, n_kv_heads=H),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
def test_output_and_gradients_equal_the_definition(name: str, documents: Tensor | None) -> None:
    attention, x = make(MODELS[name]), inputs()
    visible = torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    out = attend(attention, x, document_ids_BS=documents)
    expected = definition(attention, x, visible)
    # RoPE's angles are computed in fp32, as in Hugging Face.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(out)
    weights = [x, *attention.Wqkv.parameters(), attention.out_proj.weight]
    ours = torch.autograd.grad(out, weights, grad)
    theirs = torch.autograd.grad(expected, weights, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "yarn",
    [
        Yarn(factor=4, original_tokens=512),
        Yarn(factor=40, original_tokens=64, beta_fast=8, beta_slow=0.25),
        Yarn(factor=2, original_tokens=4096, attention_factor=1.25),
    ],
)
def test_yarn_rotates_as_transformers_does(yarn: Yarn) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    longest = int(yarn.factor * yarn.original_tokens)
    model = replace(BASE, head_width=64, rope_theta=10000, yarn=yarn, max_sequence_tokens=longest)
    positions = torch.arange(2 * S)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**llama_from_model(model)))(torch.ones(1), positions[None])
    for past_length in (0, S):
        plan = plan_attention(
            model, B, S, device=positions.device, dtype=torch.float32, past_length=past_length
        )
        for ours, table in zip((plan.cos_SR, plan.sin_SR), theirs, strict=True):
            expected = table[0, past_length : past_length + S, : 64 // 2]
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    plain = plan_attention(replace(model, yarn=None), B, S, device=positions.device, dtype=torch.float32)
    assert plain.cos_SR is not None
    assert not torch.allclose(plain.cos_SR, theirs[0][0, :S, : 64 // 2], atol=1e-2)


def test_clipping_is_active_above() -> None:
    x = inputs()
    free, clipped = make(BASE), make(MODELS["clipped"])
    assert (attend(free, x) - attend(clipped, x)).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", DocumentKernel)
def test_packed_documents_equal_separate_ones(kernel: DocumentKernel) -> None:
    attention, x = make(), inputs()
    packed = attend(attention, x, document_ids_BS=DOCUMENTS, kernel=kernel)
    for row, ids in enumerate(DOCUMENTS):
        for document in ids.unique():
            own = ids == document
            alone = attend(attention, x[row : row + 1, own])
            torch.testing.assert_close(packed[row, own], alone[0], rtol=1e-5, atol=1e-6)


def test_all_document_kernels_have_equal_gradients() -> None:
    attention, x = make(), inputs()
    expected, *grads = [
        torch.autograd.grad(attend(attention, x, document_ids_BS=DOCUMENTS, kernel=kernel).square().sum(), x)[
            0
        ]
        for kernel in DocumentKernel
    ]
    for grad in grads:
        torch.testing.assert_close(grad, expected)


def test_documents_end_with_their_sequence() -> None:
    """The second sequence continues the first one's number, and the last document has one token."""
    offsets, longest = document_offsets(torch.tensor([[3, 3, 5, 5], [5, 5, 5, 0]]))
    assert offsets.tolist() == [0, 2, 4, 7, 8] and offsets.dtype is torch.int32 and longest == 3


@pytest.mark.parametrize("name", ["rope", "alibi"])
@pytest.mark.parametrize("steps", [(7, 5), (7, 1, 1, 3), (1, 11)])
def test_positions_after_the_past_equal_those_of_one_pass(name: str, steps: tuple[int, ...]) -> None:
    attention, x = make(MODELS[name]), inputs()
    whole = attend(attention, x)
    past, start, parts = None, 0, []
    for length in steps:
        plan = plan_attention(attention.model, B, length, device=x.device, dtype=x.dtype, past_length=start)
        out, past = attention(x[:, start : start + length], plan, past)
        parts.append(out)
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("heads", [2, 3, 6, 8, 12])
def test_alibi_slopes_equal_llm_foundrys(heads: int) -> None:
    from train.model.attention import _alibi_slopes

    power = 2 ** math.ceil(math.log2(heads))
    all_slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    ours = _alibi_slopes(heads).tolist()
    assert ours == pytest.approx(
        all_slopes if power == heads else (all_slopes[1::2] + all_slopes[0::2])[:heads]
    )
