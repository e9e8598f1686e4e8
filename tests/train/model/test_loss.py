"""The chunked loss against PyTorch's cross-entropy on full logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.model.loss import IGNORE, chunked_cross_entropy

# Shapes: T tokens, D model, V vocabulary.
T, D, V = 23, 12, 50


def make_inputs(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight_VD = (scale * torch.randn(V, D, generator=generator)).to(dtype).requires_grad_()
    targets_T = torch.randint(0, V, (T,), generator=generator)
    targets_T[[0, 7, 8, T - 1]] = IGNORE
    return hidden_TD, weight_VD, targets_T


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
