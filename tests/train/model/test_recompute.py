"""Selective recomputation: the same gradients bit for bit, and no product made in vain.

tests/launch/plan/test_memory.py has what is kept.
"""

import collections
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.model.test_decoder import CFG, DENSE, B, batch, total
from train.model import experts
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.recompute import kept, run_layer
from train.model.router import Jitter, Router
from train.model.router_noise import noise_key
from train.recipe.schema import Model, Moe, Recompute

AGAIN = [grade for grade in Recompute if grade is not Recompute.nothing]
MODELS = {"moe": CFG, "qk-norm": replace(CFG, qk_norm=True), **DENSE}


def make(cfg: Model, recompute: Recompute | list[Recompute], *, keyed: bool = False) -> Decoder:
    model = Decoder(cfg, device="cpu", recompute=recompute)
    initialize(model, cfg, seed=1)
    for layer, router in enumerate(module for module in model.modules() if isinstance(module, Router)):
        if keyed:
            router.jitter = Jitter(noise_key(1, layer, torch.device("cpu")), torch.arange(B))
    return model


def gradients(model: Decoder, precision: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(5)  # noise without a key, which recomputation must repeat
    with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
        loss = total(model(*batch()))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_kept_layers(name: str, precision: torch.dtype, keyed: bool) -> None:
    if keyed and MODELS[name].moe is None:
        pytest.skip("only routers draw noise")
    expected = gradients(make(MODELS[name], Recompute.nothing, keyed=keyed), precision)
    for how in (*AGAIN, [Recompute.layer, Recompute.elementwise], [Recompute.ffn, Recompute.gates]):
        require_equal(gradients(make(MODELS[name], how, keyed=keyed), precision), expected)


@pytest.mark.parametrize("grade", AGAIN)
def test_a_graph_may_be_gone_through_again(grade: Recompute) -> None:
    """Which the loss, whose gradients are made in place, does not allow."""
    found = []
    for passes in (1, 2):
        transformer = make(replace(CFG, moe=Moe(experts=4, top_k=2)), grade).transformer
        out_BSD, *_ = transformer(*batch()[:2])
        for left in reversed(range(passes)):
            out_BSD.square().sum().backward(retain_graph=left > 0)
        found.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    require_equal(found[1], {name: 2 * gradient for name, gradient in found[0].items()})


def test_a_gpus_experts_have_the_same_gradients_whether_they_keep_gates_or_not() -> None:
    rows_E = torch.tensor([3, 0, 5])
    x, w1, v1, w2 = (torch.randn(*shape) for shape in ((8, 16), (3, 24, 16), (3, 24, 16), (3, 24, 16)))
    found = []
    for keeps_gates in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, w1, v1, w2)]
        experts.grouped_glu.plain(*inputs, rows_E, keeps_gates=keeps_gates).square().sum().backward()  # type: ignore[attr-defined]
        found.append([tensor.grad for tensor in inputs])
    for with_gates, without in zip(*found, strict=True):
        assert torch.equal(with_gates, without)


class OperationCounts(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_no_grade_makes_more_again_than_it_names() -> None:
    """Of a backward pass: a layer's products, of which two experts' are gates', and attention."""
    products, attention = [], []
    for grade in Recompute:
        loss = total(make(replace(CFG, moe=None), grade)(*batch()))
        with OperationCounts() as operations:
            loss.backward()
        products.append(operations.calls["mm"])
        attention.append(operations.calls["_scaled_dot_product_flash_attention_for_cpu"])
    kept_ones = products[0]
    # w1 and v1; then a checkpoint, which ends before the last product; then Wqkv and the output too.
    assert products == [kept_ones + 2 * again for again in (0, 0, 2, 2, 4)]
    assert attention == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("how", Recompute)
def test_what_the_host_waited_for_is_not_asked_for_again(how: Recompute) -> None:
    asked = 0

    class AskingLayer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def ask() -> int:
                nonlocal asked
                asked += 1
                return asked

            return (x * kept(ask)).exp() * kept(ask)

    x = torch.ones(2, requires_grad=True)
    for _ in range(2):  # another pass asks again
        run_layer(how, AskingLayer(), x, draws=False).sum().backward()
    assert asked == 4
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2,), 2 * torch.e + 12 * torch.e**3))


def test_evaluation_keeps_nothing() -> None:
    model = make(CFG, Recompute.gates).eval()
    with torch.no_grad():
        out = model(*batch())
    assert not out.loss_sum.requires_grad
