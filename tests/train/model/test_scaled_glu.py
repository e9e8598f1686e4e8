"""Experts in block-scaled fp8: products against float64 of the same numbers, GLUs against unrounded ones."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.train.model.test_experts import loop
from train.model import scaled_glu as module
from train.model.block_scaling import dequantised
from train.model.experts import spans_of
from train.model.scaled_products import Products, ran
from train.recipe.schema import ExpertPrecision

scaled_glu: Callable[..., Tensor] = module.scaled_glu
# Shapes: R rows, D model, F hidden, E experts.
D, F, E = 256, 128, 4
SIZES = ([30, 0, 129, 1], [0, 0, 9, 0], [128, 64, 0, 300], [0, 0, 0, 0])
EXACT = 2e-6
"""fp32 sums of 256 terms."""
LEAST, MOST = 0.02, 0.08
"""Relative error of a GLU and its gradients. An operand's rounding, evenly spread over 2**-4 of a number at
most, is 2 to 3% of it; a product has two operands, and a result two or three products in a row."""


@pytest.fixture(params=[ExpertPrecision.fp8, ExpertPrecision.mxfp8])
def precision(request: pytest.FixtureRequest) -> ExpertPrecision:
    return ExpertPrecision(request.param)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.3 * torch.randn(shape, dtype=torch.float64)).to(dtype)


def inputs_of(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(3)
    drawn = [randn(sum(sizes), D, dtype=dtype), *(randn(E, F, D, dtype=dtype) for _ in range(3))]
    return [tensor.requires_grad_() for tensor in drawn]


def products_of(precision: ExpertPrecision, sizes: list[int]) -> Products:
    return Products(precision, spans_of(torch.tensor(sizes).cumsum(0)))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_those_of_the_quantised_numbers(precision: ExpertPrecision, sizes: list[int]) -> None:
    x, w, _, _ = (tensor.detach() for tensor in inputs_of(sizes))
    y = randn(sum(sizes), F)
    products = products_of(precision, sizes)
    rows, matrices = products.format.rows(x), products.format.weights(w)
    found = products.by_matrices(rows, matrices, torch.float32)
    turned = products.by_matrices(products.format.rows(y), products.format.turned(w), torch.float32)
    sums = products.by_rows(products.columns(y), products.columns(x), torch.float32)
    x_hat, w_hat = dequantised(rows).double(), dequantised(matrices).double()
    turned_hat = dequantised(products.format.turned(w)).double()
    y_hat = dequantised(products.format.rows(y)).double()
    for expert, span in enumerate(products.spans):
        pairs = [
            (found[span], x_hat[span] @ w_hat[expert].t()),
            (turned[span], y_hat[span] @ turned_hat[expert].t()),
        ]
        by_token = [torch.zeros(-(-len(x[span]) // 128) * 128, width) for width in (F, D)]
        for padded, operand in zip(by_token, (y, x), strict=True):
            padded[: len(operand[span])] = operand[span]
        hats = [dequantised(products.format.rows(each.t().contiguous())).double() for each in by_token]
        pairs.append((sums[expert], hats[0] @ hats[1].t()))
        for mine, other in pairs:
            scale = max(other.abs().amax().item(), 1e-9) if other.numel() else 1.0
            torch.testing.assert_close(mine.double(), other, rtol=0, atol=EXACT * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES[:3])
def test_a_glu_is_within_the_error_of_the_format(
    precision: ExpertPrecision, sizes: list[int], dtype: torch.dtype
) -> None:
    inputs = inputs_of(sizes, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = loop(sizes, *exact)
    out = scaled_glu(*inputs, products_of(precision, sizes))
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    theirs = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    assert out.dtype == dtype
    for mine, other in zip(ours, theirs, strict=True):
        assert LEAST < error(mine, other) < MOST
    for expert, size in enumerate(sizes):
        assert size or not any(gradient[expert].any() for gradient in ours[2:])


def test_rows_beyond_the_last_expert_have_no_effect(precision: ExpertPrecision) -> None:
    sizes = [30, 0, 129, 1]
    x, w1, v1, w2 = inputs_of(sizes)
    (out, grads) = _with_rows(x, w1, v1, w2, precision, sizes)
    poisoned = torch.cat([x.detach(), torch.full((7, D), math.nan)]).requires_grad_()
    (more, more_grads) = _with_rows(poisoned, w1, v1, w2, precision, sizes)
    assert torch.equal(more[: len(x)], out) and torch.equal(more_grads[0][: len(x)], grads[0])
    for mine, other in zip(more_grads[1:], grads[1:], strict=True):
        assert torch.equal(mine, other) and mine.isfinite().all()


def _with_rows(
    x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor, precision: ExpertPrecision, sizes: list[int]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = scaled_glu(x, w1, v1, w2, products_of(precision, sizes))
    grad = torch.ones_like(out)
    grad[sum(sizes) :] = math.nan
    return out, torch.autograd.grad(out, [x, w1, v1, w2], grad)


def test_gates_that_are_made_again_change_nothing(precision: ExpertPrecision) -> None:
    inputs = inputs_of(SIZES[0])
    products = products_of(precision, SIZES[0])
    found = [
        torch.autograd.grad(scaled_glu(*inputs, products, keeps_gates=keeps).square().sum(), inputs)
        for keeps in (True, False)
    ]
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


def test_under_autocast_sums_are_fp32_and_weight_gradients_too(precision: ExpertPrecision) -> None:
    inputs, products = inputs_of(SIZES[0]), products_of(precision, SIZES[0])
    plain = scaled_glu(*(tensor.bfloat16() for tensor in inputs), products)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_glu(*inputs, products)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    out.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_frozen_weights_ask_for_no_product(precision: ExpertPrecision) -> None:
    x, w1, v1, w2 = inputs_of(SIZES[1])
    ran.clear()
    scaled_glu(x, w1, v1, w2, products_of(precision, SIZES[1])).sum().backward()
    assert ran == {"emulation": 9, "idle": 9 * (E - 1)}
    ran.clear()
    frozen = (w.detach() for w in (w1, v1, w2))
    scaled_glu(x, *frozen, products_of(precision, SIZES[1])).sum().backward()
    assert ran == {"emulation": 6, "idle": 6 * (E - 1)}
