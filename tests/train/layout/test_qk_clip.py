"""QK-clip: the largest logits and what becomes of them are those of a plain form in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from launch.plan.step_time import clipping_work
from train.layout.optim import build_optimizer
from train.model import largest_logits
from train.model.attention import Attention, sight_of
from train.model.decoder import Decoder
from train.recipe.schema import Latent, Model, Norm, Optimizer, OptimizerKind, Recompute, Yarn

GROUPED = Model(
    d_model=32,
    n_layers=1,
    n_heads=6,
    n_kv_heads=2,
    head_width=8,
    ffn_hidden_size=48,
    vocab_size=64,
    max_sequence_tokens=32,
    norm=Norm.rmsnorm,
    clip_qkv=None,
    moe=None,
)
LATENT = replace(
    GROUPED,
    n_kv_heads=6,
    head_width=None,
    latent=Latent(kv_rank=12, q_rank=20, nope_width=6, rope_width=4, v_width=5),
)
MODELS = {
    "grouped": GROUPED,
    "grouped, with biases": replace(GROUPED, qkv_bias=True, rope_share=0.5),
    "one key head each, multi-token prediction": replace(GROUPED, n_kv_heads=6, mtp=True),
    "latent": LATENT,
    "latent, wide queries, YaRN": replace(
        LATENT,
        latent=replace(LATENT.latent, q_rank=None),
        yarn=Yarn(factor=4, original_tokens=8),
    ),
}
LENGTH = 24


def _decoder(model: Model, recompute: Recompute = Recompute.nothing) -> Decoder:
    decoder = Decoder(model, device="cpu", recompute=recompute)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4 + (parameter.ndim == 1))
    return decoder.train()


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def _turned(x_SHW: Tensor, model: Model, *, neighbours: bool) -> Tensor:
    """Rotates by complex numbers; a YaRN's angles are taken from the model's own plan."""
    from train.model.attention import plan_attention

    length, _, width = x_SHW.shape
    plan = plan_attention(model, 1, length, device=torch.device("cpu"), dtype=torch.float64)
    if model.yarn is None:
        exponents = torch.arange(0, width, 2).double() / width
        angles = torch.arange(length).double()[:, None] / model.rope_theta**exponents
        turns = torch.polar(torch.ones_like(angles), angles)
    else:
        assert plan.cos_SR is not None and plan.sin_SR is not None
        turns = torch.complex(plan.cos_SR, plan.sin_SR)
    pairs = x_SHW.unflatten(-1, (-1, 2)) if neighbours else x_SHW.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * turns[:, None]
    return torch.view_as_real(turned).flatten(-2)


def _plain_largest(decoder: Decoder, ids_S: Tensor, document_S: Tensor | None) -> list[float]:
    """The first layer's largest logit of each head, for one sequence, one product at a time."""
    model, layer = decoder.cfg, decoder.transformer.blocks[0].norm_attn_norm
    weights = {name: parameter.detach().double() for name, parameter in layer.attn.named_parameters()}
    x = _normed(decoder.transformer.wte.weight.detach().double()[ids_S], layer.norm_1.weight, model.norm_eps)
    latent, heads = model.latent, model.n_heads
    if latent is None:
        qkv = x @ weights["Wqkv.weight"].t() + weights.get("Wqkv.bias", torch.zeros(())).double()
        q, k, _ = qkv.unflatten(-1, (-1, 8)).split([heads, model.n_kv_heads, model.n_kv_heads], dim=1)
        turned = int(8 * model.rope_share)
        q, k = (
            torch.cat([_turned(part[..., :turned], model, neighbours=False), part[..., turned:]], -1)
            for part in (q, k)
        )
        k, scale = k.repeat_interleave(heads // model.n_kv_heads, dim=1), 8**-0.5
    else:
        source = x
        if latent.q_rank is not None:
            source = _normed(x @ weights["q_a_proj.weight"].t(), weights["q_a_norm.weight"], model.norm_eps)
        up = weights["q_proj.weight" if latent.q_rank is None else "q_b_proj.weight"]
        q_plain, q_turned = (source @ up.t()).unflatten(-1, (heads, -1)).split([6, 4], dim=-1)
        narrow, shared = (x @ weights["kv_a_proj.weight"].t()).split([12, 4], dim=-1)
        narrow = _normed(narrow, weights["kv_a_norm.weight"], model.norm_eps)
        k_plain = (narrow @ weights["kv_b_proj.weight"].t()).unflatten(-1, (heads, -1))[..., :6]
        k_turned = _turned(shared[:, None], model, neighbours=True).expand(-1, heads, -1)
        q = torch.cat([q_plain, _turned(q_turned, model, neighbours=True)], -1)
        k, scale = torch.cat([k_plain, k_turned], -1), 10**-0.5
        if model.yarn is not None:
            scale *= (0.1 * torch.tensor(4.0).log().item() + 1) ** 2
    largest = []
    for head in range(heads):
        seen = [
            (q[i, head] @ k[j, head]).item() * scale
            for i in range(len(ids_S))
            for j in range(i + 1)
            if document_S is None or document_S[i] == document_S[j]
        ]
        largest.append(max(seen))
    return largest


def _largest(decoder: Decoder, ids_NBS: Tensor, documents_BS: Tensor | None) -> Tensor:
    """The same over all microbatches and sequences, [H]."""
    rows = [
        _plain_largest(decoder, ids_S, None if documents_BS is None else documents_BS[row])
        for ids_BS in ids_NBS
        for row, ids_S in enumerate(ids_BS)
    ]
    return torch.tensor(rows, dtype=torch.float64).amax(dim=0)


def _others(decoder: nn.Module) -> dict[str, Tensor]:
    """Copies of all that must stay as it is: everything but the rows of queries and keys."""
    found = {}
    for name, parameter in decoder.named_parameters():
        tensor = parameter.detach().clone()
        if name.endswith(("Wqkv.weight", "Wqkv.bias")):
            assert isinstance(decoder, Decoder)
            tensor = tensor[-8 * decoder.cfg.n_kv_heads :]
        elif name.endswith("kv_b_proj.weight"):
            tensor = tensor.unflatten(0, (6, -1))[:, 6:]
        elif name.endswith(("attn.q_proj.weight", "q_b_proj.weight")):
            continue
        found[name] = tensor
    return found


@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.muon])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_heads_are_clipped_to_the_threshold_and_no_others_change(
    name: str, packed: bool, kind: OptimizerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(largest_logits, "ELEMENTS", 6 * LENGTH * 5 * 2)  # chunks of 5 queries
    decoder = _decoder(MODELS[name], Recompute.layer if packed else Recompute.nothing)
    generator = torch.Generator().manual_seed(4)
    ids_NBS = torch.randint(0, 64, (2, 2, LENGTH + 1), generator=generator)
    documents_BS = (torch.arange(LENGTH) // torch.tensor([[7], [10]])).int() if packed else None
    before_H = _largest(decoder, ids_NBS[..., :-1], documents_BS)
    threshold = before_H.median().item()
    optimizer = build_optimizer(decoder, Optimizer(learning_rate=1.0, kind=kind, qk_clip=threshold))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    others = _others(decoder)
    for ids_BS in ids_NBS:
        outputs = decoder(ids_BS[:, :-1], documents_BS, ids_BS[:, 1:])
        (outputs.loss_sum + outputs.mtp_loss_sum).backward()
    optimizer.step()
    after_H = _largest(decoder, ids_NBS[..., :-1], documents_BS)
    torch.testing.assert_close(after_H, before_H.clamp(max=threshold), atol=0, rtol=1e-5)
    assert (before_H > threshold).sum() == 3 and before_H.max() > 1.05 * threshold
    if not decoder.cfg.mtp:
        torch.testing.assert_close(decoder.largest_logit, before_H.max().float(), atol=0, rtol=1e-5)
    for key, tensor in _others(decoder).items():
        assert torch.equal(tensor, others[key]), key


def test_a_key_of_several_heads_is_clipped_for_the_largest_and_a_query_for_its_own() -> None:
    decoder = _decoder(GROUPED)
    ids_BS = torch.randint(0, 64, (2, LENGTH + 1), generator=torch.Generator().manual_seed(4))
    largest_H = _largest(decoder, ids_BS[None, :, :-1], None)
    threshold = largest_H.sort().values[-2].item() * 0.9  # two heads are above it
    optimizer = build_optimizer(decoder, Optimizer(learning_rate=1.0, qk_clip=threshold))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weight = decoder.transformer.blocks[0].norm_attn_norm.attn.Wqkv.weight
    before = weight.detach().double().unflatten(0, (-1, 8))
    decoder(ids_BS[:, :-1], None, ids_BS[:, 1:]).loss_sum.backward()
    optimizer.step()
    factors = (weight.detach().double().unflatten(0, (-1, 8)) / before).mean(dim=(1, 2))
    for key in range(2):
        scales = [min(1.0, threshold / largest_H[3 * key + place].item()) for place in range(3)]
        assert factors[6 + key].item() == pytest.approx(min(scales) ** 0.5, rel=1e-5)
        for place, scale in enumerate(scales):
            assert factors[3 * key + place].item() == pytest.approx(scale / min(scales) ** 0.5, rel=1e-5)


def test_a_skipped_update_and_an_evaluation_clip_nothing() -> None:
    decoder = _decoder(GROUPED)
    optimizer = build_optimizer(decoder, Optimizer(learning_rate=0.1, qk_clip=1e-3))
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    ids_BS = torch.randint(0, 64, (2, LENGTH + 1))
    decoder.eval()(ids_BS[:, :-1], None, ids_BS[:, 1:]).loss_sum.backward()
    watching = [module.logits for module in decoder.modules() if isinstance(module, Attention)]
    assert [logits.of_heads_H for logits in watching if logits is not None] == [None]
    decoder.train()(ids_BS[:, :-1], None, ids_BS[:, 1:])
    decoder.zero_grad(set_to_none=True)
    optimizer.step()
    assert decoder.largest_logit is not None
    assert all(torch.equal(parameter, before[name]) for name, parameter in decoder.named_parameters())


def test_the_plan_counts_the_products() -> None:
    q_BSHR, k_BSGR = torch.zeros(2, 16, 6, 8), torch.zeros(2, 16, 2, 8)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(largest_logits, "ELEMENTS", 1)
        largest_logits.largest_logits(q_BSHR, k_BSGR, sight_of(16, None, torch.device("cpu")))
    # The plan leaves out half of the diagonal.
    assert clipping_work(GROUPED, 2 * 16, 16).matrix_flops * 17 / 16 == counter.get_total_flops()
