"""Latent attention against its definition: positions, YaRN, documents, recomputation, and what is kept."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train.model.attention import DocumentKernel, KeyValue, plan_attention
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.kv_cache import CachedDecoder
from train.model.latent_attention import LatentAttention
from train.recipe.schema import Latent, Model, Moe, Norm, Recompute, Yarn

# Shapes: B batch, S sequence, H heads, D model.
B, S, H, D = 2, 12, 4, 32
DEEPSEEK = Model(
    d_model=D,
    n_layers=2,
    n_heads=H,
    n_kv_heads=H,
    latent=Latent(kv_rank=12, q_rank=20, nope_width=10, rope_width=6, v_width=8),
    ffn_hidden_size=16,
    vocab_size=64,
    max_sequence_tokens=64,
    norm=Norm.rmsnorm,
    rope_theta=100.0,
    init_std=0.3,
)
assert DEEPSEEK.latent is not None
MODELS = {
    "v3": replace(DEEPSEEK, yarn=Yarn(factor=4, original_tokens=16)),
    "v2": replace(DEEPSEEK, yarn=Yarn(factor=4, original_tokens=16, attention_factor=1.2)),
    "lite": replace(DEEPSEEK, latent=replace(DEEPSEEK.latent, q_rank=None)),
    "wide values": replace(DEEPSEEK, latent=replace(DEEPSEEK.latent, v_width=16)),
}
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [7] * 12])


def make(model: Model) -> LatentAttention:
    attention = LatentAttention(model, "cpu")
    initialize(attention, model, seed=1)
    with torch.no_grad():
        for name, weight in attention.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(torch.linspace(-0.5, 0.5, len(weight)))
    return attention.double()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, S, D, generator=generator, dtype=torch.float64, requires_grad=True)


def attend(
    attention: LatentAttention, model: Model, x_BSD: Tensor, **plan: Tensor | DocumentKernel | None
) -> Tensor:
    shared = plan_attention(model, *x_BSD.shape[:2], device=x_BSD.device, dtype=x_BSD.dtype, **plan)
    return attention(x_BSD, shared)[0]


def definition(attention: LatentAttention, model: Model, x_BSD: Tensor, visible_BSS: Tensor) -> Tensor:
    """Equations 9 to 19 of DeepSeek-V2, a head at a time, with positions as complex numbers."""
    latent, weights = model.latent, dict(attention.named_parameters())
    assert latent is not None
    N, W, V = latent.nope_width, latent.rope_width, latent.v_width

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * weights[f"{name}.weight"]

    frequencies = model.rope_theta ** -(torch.arange(0, W, 2) / W)
    if model.yarn is not None:
        turns = model.yarn.original_tokens * frequencies / (2 * math.pi)
        places = [W / 2 * math.log(model.yarn.original_tokens / (2 * math.pi * n)) for n in (32, 1)]
        first, last = (place / math.log(model.rope_theta) for place in places)
        first, last = max(math.floor(first), 0), min(math.ceil(last), W - 1)
        stretched = ((torch.arange(W // 2) - first) / (last - first)).clamp(0, 1)
        frequencies = frequencies * (1 - stretched) + frequencies / model.yarn.factor * stretched
        assert (turns[stretched == 0] > 1).all()
    angles = torch.arange(S)[:, None] * frequencies.double()

    def turned(x_BSW: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_BSW.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)

    source = x_BSD
    if latent.q_rank is not None:
        source = normed(x_BSD @ weights["q_a_proj.weight"].T, "q_a_norm")
    queries = weights["q_b_proj.weight" if latent.q_rank else "q_proj.weight"]
    both = x_BSD @ weights["kv_a_proj.weight"].T
    c, shared_key = normed(both[..., : latent.kv_rank], "kv_a_norm"), turned(both[..., latent.kv_rank :])
    factor = 1.0
    if model.yarn is not None:
        factor = model.yarn.attention_factor or 0.1 * math.log(model.yarn.factor) + 1
    found = []
    for head in range(H):
        q = source @ queries[head * (N + W) : (head + 1) * (N + W)].T
        kv = c @ weights["kv_b_proj.weight"][head * (N + V) : (head + 1) * (N + V)].T
        scores = q[..., :N] @ kv[..., :N].mT + turned(q[..., N:]) @ shared_key.mT
        scores = scores * factor**2 / math.sqrt(N + W)
        found.append(scores.masked_fill(~visible_BSS, -math.inf).softmax(-1) @ kv[..., N:])
    return torch.cat(found, dim=-1) @ weights["out_proj.weight"].T


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", [None, *DocumentKernel])
def test_output_and_gradients_equal_the_definition(name: str, kernel: DocumentKernel | None) -> None:
    attention, x = make(MODELS[name]), inputs()
    visible, documents = torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S), None
    if kernel is not None:
        documents = DOCUMENTS
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    out = attend(attention, MODELS[name], x, document_ids_BS=documents, kernel=kernel)
    expected = definition(attention, MODELS[name], x, visible)
    # RoPE's angles are computed in fp32, as in Hugging Face.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    weights = [x, *attention.parameters()]
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(each, weights, grad) for each in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [(7, 5), (7, 1, 1, 3), (1, 11)])
def test_kept_vectors_stand_for_keys_and_values(name: str, steps: tuple[int, ...]) -> None:
    model, x = MODELS[name], inputs()
    attention, start = make(model), 0
    past: KeyValue | None = None
    parts = []
    for length in steps:
        plan = plan_attention(model, B, length, device=x.device, dtype=x.dtype, past_length=start)
        out, past = attention(x[:, start : start + length], plan, past)
        parts.append(out)
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), attend(attention, model, x))
    assert past is not None and model.latent is not None
    assert [part.shape for part in past] == [(B, 1, S, model.latent.kv_rank), (B, 1, S, 6)]


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_what_is_kept_equals_generation_without(name: str) -> None:
    model = replace(MODELS[name], moe=Moe(experts=12, top_k=3))
    decoder = Decoder(model, device="cpu")
    initialize(decoder, model, seed=1)
    ids_BS = torch.randint(model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    ids_BS[1, :4] = -1  # a shorter prompt
    kept, afresh = (CachedDecoder(decoder, use_cache=use) for use in (True, False))
    fed_BS = ids_BS
    for _ in range(8):
        found, expected = kept.feed(fed_BS), afresh.feed(fed_BS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        fed_BS = found.argmax(-1, keepdim=True)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["v3", "lite"])
def test_recomputed_gradients_are_those_of_kept_layers(name: str, precision: torch.dtype) -> None:
    found = {}
    ids_BS = torch.randint(64, (2, S), generator=torch.Generator().manual_seed(0))
    for grade in Recompute:
        decoder = Decoder(MODELS[name], device="cpu", recompute=grade)
        initialize(decoder, MODELS[name], seed=1)
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            decoder(ids_BS, DOCUMENTS, ids_BS).loss_sum.backward()
        found[grade] = {key: weight.grad for key, weight in decoder.named_parameters()}
    for gradients in found.values():
        for key, expected in found[Recompute.nothing].items():
            assert expected is not None and expected.any() and torch.equal(gradients[key], expected), key
