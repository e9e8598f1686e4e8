"""Transfer of rates: what the rule says, what it is equal to, and that updates stay as large at any size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.hf.config import dbrx_from_model
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Model, Moe, Optimizer, OptimizerKind, TransferBase
from train.recipe.topology import Topology
from train.recipe.transfer import Scales, transfer_scales

SMOKE = str(Path(__file__).resolve().parents[3] / "yamls/smoke.yaml")
BASE = TransferBase(d_model=16, n_layers=2, n_heads=1, hidden_size=24, top_k=2)
SMALL = Model(
    d_model=16,
    n_layers=2,
    n_heads=1,
    n_kv_heads=1,
    ffn_hidden_size=24,
    vocab_size=64,
    max_sequence_tokens=32,
    init_std=0.1,
    moe=Moe(experts=8, top_k=2),
)
WIDE = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "ffn_hidden_size": 96}
BLOCK = "transformer.blocks.1."


def names(model: Model) -> list[str]:
    return [name for name, _ in Decoder(model, device="meta").named_parameters()]


def test_a_model_of_the_base_s_sizes_is_trained_as_without() -> None:
    for moe in (Moe(8, 2, shared_hidden_size=24, shared_gate=True), None):
        model = replace(SMALL, moe=moe, mtp=True, qk_norm=True, qkv_bias=True)
        based = replace(model, transfer_base=replace(BASE, top_k=2 if moe else 1))
        for name in names(model):
            assert transfer_scales(model, name) == Scales()
            for orthogonal in (False, True):
                assert transfer_scales(based, name, orthogonal=orthogonal) == Scales(), name


def test_scales_are_those_of_the_published_tables() -> None:
    """Four times the width with twice the layers and experts; finer experts: a hidden size of half."""
    model = replace(SMALL, d_model=64, n_layers=4, n_heads=4, ffn_hidden_size=12, moe=Moe(16, 4))
    model = replace(model, transfer_base=BASE)
    expected = {
        "transformer.wte.weight": Scales(1, 1, 1 / 4),
        "lm_head.weight": Scales(1 / 4, 1 / 4, 1),
        BLOCK + "norm_attn_norm.attn.Wqkv.weight": Scales(1 / 2, 1 / 4, 1 / 8),
        BLOCK + "norm_attn_norm.attn.Wqkv.bias": Scales(1, 1, 1 / 8),
        # A root of the depth is in the recipe's initial scale already.
        BLOCK + "norm_attn_norm.attn.out_proj.weight": Scales(1 / 2 / 2**0.5, 1 / 8, 1 / 4),
        BLOCK + "ffn.router.layer.weight": Scales(1 / 4, 1 / 4, 1 / 4),
        BLOCK + "ffn.experts.mlp.w1": Scales(1 / 2, 1 / 4, 1 / 2),
        BLOCK + "ffn.experts.mlp.w2": Scales(2 * 2 / 2**0.5, 1, 1 / 8),
        BLOCK + "norm_attn_norm.norm_1.weight": Scales(1, 1, 1 / 8),
        "transformer.norm_f.weight": Scales(1, 1, 1 / 4),
    }
    assert {name: transfer_scales(model, name) for name in expected} == {
        name: pytest.approx(scales) for name, scales in expected.items()
    }
    # The spectral norm of Muon's update is that of the longer side's root: sqrt(4) for each of these.
    for name, out_over_in in (("attn.Wqkv.weight", 1.0), ("attn.out_proj.weight", 1.0), ("mlp.w1", 1 / 8)):
        depth = 2.0 if "out_proj" in name else 1.0
        found = transfer_scales(model, next(n for n in names(model) if n.endswith(name)), orthogonal=True)
        longer = 64 / 24 if "mlp" in name else 4.0
        assert found.rate * depth == pytest.approx((out_over_in / longer) ** 0.5)


def test_a_multiplied_weight_is_trained_as_the_scaled_one_that_replaces_it() -> None:
    """The equality that keeps multipliers out of the model: of initial scale, rate, decay and eps."""
    times, x = 0.25, torch.randn(32, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def trained(weight: Tensor, factor: float, **options: float) -> Tensor:
        weight = weight.clone().requires_grad_()
        optimizer = torch.optim.AdamW([weight], **options)  # type: ignore[arg-type]
        for _ in range(5):
            optimizer.zero_grad()
            (x @ weight.T * factor).square().sum().backward()
            optimizer.step()
        return weight.detach() * factor

    multiplied = trained(start, times, lr=0.1, weight_decay=0.2, eps=1.0)
    scaled = trained(start * times, 1.0, lr=0.1 * times, weight_decay=0.2 / times, eps=1.0 / times)
    torch.testing.assert_close(scaled, multiplied)


def updates(model: Model, kind: OptimizerKind, steps: int = 3) -> dict[str, float]:
    """Root mean square of what a few steps change in the last layer's and the model's outputs."""
    decoder = Decoder(model, device="cpu")
    initialize(decoder, model, 1)
    optimizer = build_optimizer(decoder, Optimizer(kind=kind, learning_rate=0.01, weight_decay=0.1))
    seen: dict[str, Tensor] = {}
    last = decoder.transformer.layers[-1]
    places: dict[str, Any] = {"qkv": last.norm_attn_norm.attn.Wqkv, "ffn": last.ffn, "stream": last}
    for name, module in places.items():
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 64, (4,), generator=draw)[torch.randint(0, 4, (4, 17), generator=draw)]

    def outputs() -> dict[str, Tensor]:
        with torch.no_grad():
            logits = decoder(ids[:, :-1]).logits_BSV
        return {name: tensor.detach().clone() for name, tensor in (seen | {"logits": logits}).items()}

    first = outputs()
    for _ in range(steps):
        optimizer.zero_grad()
        out = decoder(ids[:, :-1], targets_BS=ids[:, 1:])
        (out.loss_sum / out.target_tokens).backward()
        optimizer.step()
    return {name: (after - first[name]).square().mean().sqrt().item() for name, after in outputs().items()}


@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.muon])
def test_updates_of_activations_stay_as_large_at_any_size(kind: OptimizerKind) -> None:
    small = updates(SMALL, kind)
    others = {
        "four times as wide": replace(SMALL, **WIDE),  # type: ignore[arg-type]
        "four times as deep": replace(SMALL, n_layers=8),
        "four times the experts, a quarter as wide": replace(SMALL, ffn_hidden_size=6, moe=Moe(32, 8)),
    }
    for what, model in others.items():
        found = updates(replace(model, transfer_base=BASE), kind)
        ratios = {name: found[name] / small[name] for name in small}
        # A layer's own share of the stream falls with the depth, the stream's change does not.
        ratios["ffn"] *= model.n_layers / SMALL.n_layers
        assert all(0.5 < ratio < 2 for ratio in ratios.values()), (what, ratios)
    plain = updates(others["four times as wide"], kind)
    assert plain["stream"] > 3 * small["stream"] and plain["ffn"] > 5 * small["ffn"]


def test_groups_have_the_rule_s_rates_and_keep_the_decay_of_a_step() -> None:
    model = replace(SMALL, **WIDE, transfer_base=BASE)  # type: ignore[arg-type]
    decoder = Decoder(model, device="cpu")
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    for kind in OptimizerKind:
        recipe = Optimizer(kind=kind, learning_rate=0.02, weight_decay=0.1)
        seen = 0
        for group in build_optimizer(decoder, recipe).param_groups:
            for parameter in group["params"]:
                scales = transfer_scales(
                    model, names[parameter], orthogonal=bool(group.get("orthogonal", False))
                )
                assert group["lr"] == pytest.approx(0.02 * scales.rate) and group["lr_scale"] == scales.rate
                if kind is not OptimizerKind.lion:
                    assert group["eps"] == pytest.approx(1e-8 * scales.eps)
                decay = 0.1 * (0.02 if kind is OptimizerKind.lion else 1) if parameter.ndim > 1 else 0.0
                assert group["lr_scale"] * group["weight_decay"] == pytest.approx(decay)
                seen += 1
        assert seen == len(names)


def test_neither_the_function_nor_an_export_depends_on_it() -> None:
    model = replace(SMALL, transfer_base=BASE)
    first, second = Decoder(SMALL, device="cpu"), Decoder(model, device="cpu")
    initialize(first, SMALL, 1)
    second.load_state_dict(first.state_dict())
    ids = torch.arange(16)[None]
    assert torch.equal(first(ids).logits_BSV, second(ids).logits_BSV)
    assert dbrx_from_model(model) == dbrx_from_model(SMALL)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.transfer_base.n_heads=4"], "n_heads: has heads of 64 / 4, the model heads of 32; grow the"),
        (["model.tie_embeddings=true"], "needs a rate for the embedding and another for the output"),
        (["model.moe.normalize_weights_p=2"], "set model.moe.normalize_weights_p=1"),
        (["model.moe.normalize_weights_p=null", "model.moe.score=sigmoid"], "add up to the same"),
        (
            [
                "model.latent={kv_rank: 8, nope_width: 8, rope_width: 8, v_width: 8}",
                "model.clip_qkv=null",
                "model.n_kv_heads=4",
            ],
            "has no rule for the ranks of model.latent",
        ),
    ],
)
def test_what_the_rule_does_not_hold_for_is_refused(overrides: list[str], said: str) -> None:
    base = "model.transfer_base={d_model: 64, n_layers: 2, n_heads: 2, hidden_size: 112, top_k: 4}"
    validate(load_recipe(SMOKE, [base]), Topology(), SMOKE)
    with pytest.raises(UserError) as caught:
        validate(load_recipe(SMOKE, [base, *overrides]), Topology(), SMOKE)
    assert "model.transfer_base" in str(caught.value) and said in str(caught.value)
