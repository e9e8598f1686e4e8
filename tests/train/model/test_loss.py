"""The chunked loss against PyTorch's cross-entropy on full logits."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.model import loss, loss_kernel
from train.model.loss import IGNORE, chunked_cross_entropy

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Shapes: T tokens, D model, V vocabulary.
T, D, V = 23, 12, 50


def make_inputs(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight_VD = (scale * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_()
    targets_T = torch.randint(0, V, (T,), generator=generator)
    targets_T[[0, 7, 8, T - 1]] = IGNORE
    return hidden_TD, weight_VD, targets_T


@pytest.fixture(autouse=IS_INTERPRETED)
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the kernel of a GPU."""
    monkeypatch.setattr(loss_kernel, "MOST_COLUMNS", 32)  # a block of columns, and a part of one
    monkeypatch.setattr(loss, "_is_for_kernel", lambda logits_CV: logits_CV.dtype in loss_kernel.DTYPES)


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="runs this file again")
def test_a_gpus_kernel_computes_the_same() -> None:
    """All tests of this file once more, in a process whose Triton interprets the kernel of a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def plain(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    return functional.cross_entropy((hidden_TD @ weight_VD.t()).float(), targets_T, reduction="none")


@pytest.mark.parametrize("chunk", [1, 5, 23, 1024])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_value_and_gradients_equal_plain_cross_entropy(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(dtype)
    total, losses_T = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, chunk)
    expected_T = plain(hidden_TD, weight_VD, targets_T)
    torch.testing.assert_close(losses_T, expected_T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total, expected_T.sum(), rtol=tolerance, atol=tolerance)
    assert losses_T.dtype == total.dtype == torch.float32
    assert not losses_T.requires_grad
    assert not losses_T[targets_T == IGNORE].any()
    ours = torch.autograd.grad(0.25 * total, (hidden_TD, weight_VD))
    theirs = torch.autograd.grad(0.25 * expected_T.sum(), (hidden_TD, weight_VD))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        scale = other.abs().max().item()
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_z_loss_of_the_logits_and_its_gradient(chunk: int, dtype: torch.dtype) -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    logits_TV = exact[0] @ exact[1].t()
    squares_T = logits_TV.logsumexp(dim=-1).square()[targets_T != IGNORE]
    expected_T = functional.cross_entropy(logits_TV, targets_T, reduction="none")
    expected = expected_T.sum() + 0.03 * squares_T.sum()
    total, losses_T = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, chunk, z_weight=0.03)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses_T.double(), expected_T, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(0.25 * total, (hidden_TD, weight_VD))
    for mine, other in zip(ours, torch.autograd.grad(0.25 * expected, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-6 * other.abs().max().item())


def test_under_autocast_products_are_bf16_and_the_sum_over_chunks_fp32() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses_T = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, 4)
    expected_T = plain(hidden_TD.bfloat16(), weight_VD.bfloat16(), targets_T)
    torch.testing.assert_close(losses_T, expected_T)
    ours = torch.autograd.grad(total, weight_VD)[0]
    exact = torch.autograd.grad(plain(hidden_TD, weight_VD, targets_T).sum(), weight_VD)[0]
    assert ours.dtype == torch.float32
    # One rounding per chunk's product, not of the running sum: the error stays that of one product.
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-2 * exact.abs().max().item())
    assert not torch.equal(ours, ours.bfloat16().float())


def test_logits_far_apart_give_finite_losses() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(torch.float32, scale=1e3)
    total, losses_T = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, 8)
    torch.testing.assert_close(losses_T, plain(hidden_TD, weight_VD, targets_T))
    assert losses_T.max() > 1000
    assert torch.isfinite(total)


def test_without_gradients_none_are_made() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(torch.float32)
    with torch.no_grad():
        total, losses_T = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, 8)
    assert not total.requires_grad
    torch.testing.assert_close(losses_T, plain(hidden_TD, weight_VD, targets_T))
    frozen, _ = chunked_cross_entropy(hidden_TD, weight_VD.detach(), targets_T, 8)
    frozen.backward()
    assert hidden_TD.grad is not None


def test_a_second_backward_pass_is_refused() -> None:
    total, _ = chunked_cross_entropy(*make_inputs(torch.float32), 8)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_all_targets_ignored() -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(torch.float32)
    total, _ = chunked_cross_entropy(hidden_TD, weight_VD, torch.full_like(targets_T, IGNORE), 8)
    total.backward()
    assert total == 0
    assert hidden_TD.grad is not None and not hidden_TD.grad.any()
    assert weight_VD.grad is not None and not weight_VD.grad.any()


@pytest.mark.skipif(not IS_INTERPRETED, reason="of the kernel: torch's operations lose them with the loss")
def test_a_nearly_certain_target_keeps_the_digits_of_its_gradient() -> None:
    hidden_TD = torch.eye(2, 4, requires_grad=True)
    weight_VD = torch.tensor([[15.0, 0.0, 0.0, 0.0], [0.0, 12.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    targets_T = torch.tensor([0, 1])
    chunked_cross_entropy(hidden_TD, weight_VD, targets_T, 2)[0].backward()
    exact_TD = hidden_TD.detach().double().requires_grad_()
    functional.cross_entropy(exact_TD @ weight_VD.double().t(), targets_T, reduction="sum").backward()
    assert hidden_TD.grad is not None and exact_TD.grad is not None
    torch.testing.assert_close(hidden_TD.grad.double(), exact_TD.grad, rtol=1e-2, atol=0)


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_shows_in_the_loss(logit: float) -> None:
    hidden_TD, weight_VD, targets_T = make_inputs(torch.float32)
    hidden_TD.data[3] = logit
    total, losses_T = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, 8)
    assert total.isnan() and losses_T.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("default", [True, False])
def test_a_chunk_suits_the_device_unless_it_is_given(default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def note(logits_CV: Tensor, *_: object) -> tuple[Tensor, None]:
        rows.append(len(logits_CV))
        return torch.zeros(len(logits_CV)), None

    monkeypatch.setattr(loss, "_losses", note)
    hidden_TD = torch.zeros(2500, 4)
    targets_T, chunk = torch.zeros(2500, dtype=torch.int64), None if default else 2000
    chunked_cross_entropy(hidden_TD, torch.zeros(8, 4), targets_T, chunk)
    assert rows == ([1024, 1024, 452] if default else [2000, 500])
