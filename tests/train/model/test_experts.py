"""The experts' three forms against a loop in float64: torch's grouped product, one by one, and a CPU's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.model import experts
from train.model.experts import HAS_GROUPED_MM, grouped_glu

# Shapes: R rows, D model, F hidden, E experts.
D, F, E = 24, 40, 4
SIZES = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 2, 70, 0], [64, 64, 0, 64], [0, 0, 0, 0])
Glu = Callable[..., Tensor]


@pytest.fixture(params=["cpu", "grouped_mm", "product_by_product"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Glu:
    if request.param == "cpu":
        return grouped_glu
    if request.param == "grouped_mm":
        if not HAS_GROUPED_MM:
            pytest.skip("this torch has no grouped_mm, which came with 2.10")
    else:
        monkeypatch.setattr(experts, "HAS_GROUPED_MM", False)
    return grouped_glu.plain  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_run() -> None:
    torch.manual_seed(3)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (0.3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()


def loop(sizes: list[int], x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor) -> Tensor:
    parts = enumerate(x.split(sizes))
    return torch.cat([(functional.silu(rows @ w1[e].t()) * (rows @ v1[e].t())) @ w2[e] for e, rows in parts])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_each_form_equals_a_loop(form: Glu, sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    inputs = [randn(sum(sizes), D, dtype=dtype), *(randn(E, F, D, dtype=dtype) for _ in range(3))]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = loop(sizes, *exact)
    out = form(*inputs, torch.tensor(sizes))
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    theirs = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().amax().item() if other.numel() else 1.0
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=tolerance * max(scale, 1e-9))


def test_under_autocast_products_are_bf16_and_weight_gradients_fp32(form: Glu) -> None:
    x, w = randn(6, D, dtype=torch.float32), randn(2, F, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = form(x, w, w, w, torch.tensor([2, 4]))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


def test_frozen_weights_have_no_gradient_and_change_no_other(form: Glu) -> None:
    x, w1, v1, w2 = randn(9, D, dtype=torch.float64), *(randn(E, F, D, dtype=torch.float64) for _ in range(3))
    sizes = torch.tensor([3, 0, 5, 1])
    (wanted,) = torch.autograd.grad(form(x, w1, v1, w2, sizes).sum(), [w2])
    out = form(x.detach(), w1.detach(), v1.detach(), w2, sizes)
    (found,) = torch.autograd.grad(out.sum(), [w2])
    torch.testing.assert_close(found, wanted)


def test_memory_that_was_used_before_leaves_no_trace(form: Glu, poisoned: None) -> None:
    # An expert without rows must get a gradient of zeros, not what its memory held before.
    sizes = [0, 5, 0, 4]
    inputs = [randn(9, D, dtype=torch.float32), *(randn(E, F, D, dtype=torch.float32) for _ in range(3))]
    out = form(*inputs, torch.tensor(sizes))
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
    for gradient_EFD in gradients[1:]:
        assert [bool(matrix.any()) for matrix in gradient_EFD] == [size > 0 for size in sizes]


@pytest.fixture
def poisoned() -> object:
    """Torch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
