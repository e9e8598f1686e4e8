"""The MoE layer against those of transformers: DeepSeek-V3 and V2, Qwen3-MoE, Qwen2-MoE with its gate.

16 experts, so that an order by name (0, 1, 10, 11, 2) would show; fp32, to 1e-5; gradients too.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.model.moe import MoE
from train.recipe.schema import Balance, GroupScore, Moe, Score

# Shapes: B batch, S sequence, D model, F hidden, E experts.
B, S, D, F, E, K = 2, 33, 32, 24, 16, 4
SHARED = 40
COMMON = {"hidden_size": D, "moe_intermediate_size": F, "num_experts_per_tok": K, "hidden_act": "silu"}
DEEPSEEK = COMMON | {
    "n_routed_experts": E,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
QWEN = COMMON | {"num_experts": E}


def theirs(family: str, name: str, **config: Any) -> nn.Module:
    """Makes one of transformers' layers with random weights, or skips where it has none."""
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    except ImportError:
        pytest.skip(f"this transformers has no {family}")
    layer_class = next(getattr(module, each) for each in LAYERS[family] if hasattr(module, each))
    made = getattr(configs, f"{name}Config")(**config)
    made._experts_implementation = "eager"
    layer: nn.Module = layer_class(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * D**-0.5)
        for buffer in layer.buffers():  # the bias: positive, since transformers 4.51 masks groups with 0
            buffer.copy_(torch.rand(buffer.shape, generator=generator) / 2)
    return layer


LAYERS = {
    "deepseek_v3": ("DeepseekV3MoE",),
    "deepseek_v2": ("DeepseekV2Moe", "DeepseekV2MoE"),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock",),
    "qwen2_moe": ("Qwen2MoeSparseMoeBlock",),
}


def stacked(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns their experts' matrices as ours: each [E x F, D]."""
    experts = layer.experts
    if isinstance(experts, nn.ModuleList):
        gates, ups, downs = (
            torch.cat(
                [
                    getattr(each, f"{name}_proj").weight.t()
                    if name == "down"
                    else getattr(each, f"{name}_proj").weight
                    for each in experts
                ]
            )
            for name in ("gate", "up", "down")
        )
        return gates, ups, downs
    gates, ups = experts.gate_up_proj.chunk(2, dim=1)
    return gates.flatten(0, 1), ups.flatten(0, 1), experts.down_proj.mT.flatten(0, 1)


def ours(layer: Any, moe: Moe, shared: str = "") -> MoE:
    """Makes our layer with their weights."""
    made = MoE(D, F, moe, "cpu")
    gate = layer.gate
    with torch.no_grad():
        made.router.layer.weight.copy_(gate.weight)
        if made.router.expert_bias is not None:
            made.router.expert_bias.copy_(gate.e_score_correction_bias)
        for name, weight in zip(("w1", "v1", "w2"), stacked(layer), strict=True):
            getattr(made.experts.mlp, name).copy_(weight)
        if shared:
            for name, theirs_name in (("w1", "gate_proj"), ("v1", "up_proj"), ("w2", "down_proj")):
                getattr(made.shared, name).weight.copy_(getattr(getattr(layer, shared), theirs_name).weight)
        if moe.shared_gate:
            assert made.shared_gate is not None
            made.shared_gate.weight.copy_(layer.shared_expert_gate.weight)
    return made


def deepseek_v3() -> tuple[nn.Module, MoE]:
    layer = theirs("deepseek_v3", "DeepseekV3", norm_topk_prob=True, **DEEPSEEK)
    moe = Moe(
        experts=E,
        top_k=K,
        score=Score.sigmoid,
        balance=Balance.both,
        weight_scale=2.5,
        groups=4,
        top_groups=2,
        shared_hidden_size=2 * F,
    )
    return layer, ours(layer, moe, "shared_experts")


def deepseek_v2() -> tuple[nn.Module, MoE]:
    layer = theirs("deepseek_v2", "DeepseekV2", topk_method="group_limited_greedy", **DEEPSEEK)
    moe = Moe(
        experts=E,
        top_k=K,
        normalize_weights_p=None,
        weight_scale=2.5,
        groups=4,
        top_groups=2,
        group_score=GroupScore.max,
        shared_hidden_size=2 * F,
    )
    return layer, ours(layer, moe, "shared_experts")


def qwen3_moe(normalized: bool = True) -> tuple[nn.Module, MoE]:
    layer = theirs("qwen3_moe", "Qwen3Moe", norm_topk_prob=normalized, **QWEN)
    return layer, ours(layer, Moe(experts=E, top_k=K, normalize_weights_p=1.0 if normalized else None))


def qwen2_moe() -> tuple[nn.Module, MoE]:
    layer = theirs("qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=SHARED, **QWEN)
    moe = Moe(experts=E, top_k=K, normalize_weights_p=None, shared_hidden_size=SHARED, shared_gate=True)
    return layer, ours(layer, moe, "shared_expert")


@pytest.mark.parametrize(
    "make",
    [deepseek_v3, deepseek_v2, qwen3_moe, lambda: qwen3_moe(normalized=False), qwen2_moe],
    ids=["deepseek_v3", "deepseek_v2", "qwen3_moe", "qwen3_moe-not-normalised", "qwen2_moe"],
)
def test_layer_and_its_gradients_equal_those_of_transformers(
    make: Callable[[], tuple[nn.Module, MoE]],
) -> None:
    layer, mine = make()
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = layer(x_BSD)
    expected_BSD = expected[0] if isinstance(expected, tuple) else expected
    out_BSD, aux = mine(x_BSD)
    torch.testing.assert_close(out_BSD, expected_BSD, rtol=1e-5, atol=1e-5)
    assert (aux.expert_tokens_E > 0).all(), "an expert without tokens would not be compared"
    direction_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))
    router = (mine.router.layer.weight, layer.gate.weight)
    for leaf, their_leaf in ((x_BSD, x_BSD), router):
        gradient = torch.autograd.grad(out_BSD, leaf, direction_BSD, retain_graph=True)[0]
        wanted = torch.autograd.grad(expected_BSD, their_leaf, direction_BSD, retain_graph=True)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
