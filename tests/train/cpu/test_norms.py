"""Norms on a CPU round once, as on a GPU."""

import pytest
import torch
from torch import nn

from train.model.norms import LayerNorm, RmsNorm

UNIT_ROUNDOFF = 2.0**-8


@pytest.mark.parametrize("norm", [LayerNorm(64, eps=1e-5, bias=False), RmsNorm(64, eps=1e-5)])
def test_results_and_gradients_in_bf16_are_rounded_once(norm: nn.Module) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(512, 64), torch.randn(512, 64)]
    rounded = []
    for dtype in (torch.bfloat16, torch.float64):
        norm = norm.to(dtype)
        norm.zero_grad()
        x_TD, grad_TD = (each.bfloat16().to(dtype) for each in inputs)
        out_TD = norm(x_TD.requires_grad_())
        out_TD.backward(grad_TD)
        weight = next(norm.parameters())
        assert out_TD.dtype == dtype and weight.grad is not None and x_TD.grad is not None
        rounded.append([part.double() for part in (out_TD, x_TD.grad, weight.grad)])
    for ours, exact in zip(*rounded, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < UNIT_ROUNDOFF
