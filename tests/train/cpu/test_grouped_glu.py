"""The grouped GLU on CPUs against a loop over the experts and against MegaBlocks' own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.cpu.grouped_glu import grouped_glu
from train.model import megablocks_ops

megablocks_ops.install()

SIZES = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 2, 70, 0], [64, 64, 0, 64], [0, 0, 0, 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_glu_equals_a_loop(sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    width, hidden, experts = 24, 40, 4

    def randn(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()

    inputs = [randn(sum(sizes), width), *(randn(experts, hidden, width) for _ in range(3))]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, w1, v1, w2 = exact
    expected = torch.cat(
        [
            (functional.silu(rows @ w1[e].t()) * (rows @ v1[e].t())) @ w2[e]
            for e, rows in enumerate(x.split(sizes))
        ]
    )
    out = grouped_glu(*inputs, torch.tensor(sizes))
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    theirs = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().amax().item() if other.numel() else 1.0
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=tolerance * max(scale, 1e-9))


def test_grouped_glu_equals_megablocks_own() -> None:
    from megablocks.layers import glu

    sizes = torch.tensor([3, 0, 9])
    inputs = [torch.randn(12, 8, requires_grad=True)] + [
        torch.randn(3, 16, 8, requires_grad=True) for _ in range(3)
    ]
    results = []
    for function in (glu.memory_optimized_grouped_glu, glu.memory_optimized_grouped_glu.plain):
        out = function(*inputs, sizes, functional.silu)
        # MegaBlocks overwrites the output's gradient with the input's.
        results.append(
            [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, 96).view(12, 8).clone())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_bf16_and_weight_gradients_fp32() -> None:
    x, w = torch.randn(6, 8), torch.randn(2, 16, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_glu(x, w, w, w, torch.tensor([2, 4]))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
