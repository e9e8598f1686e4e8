"""Checks of the device's attention against fp32 on the CPU: document masking and grouped-query heads.

Shapes: B sequences, H query heads, G key-value heads, S tokens, W width of a head.
"""

import torch
from torch import Tensor

from launch.gpu_check.rows import CheckRow, deviation_row
from train.model.attention import Attention, DocumentKernel, has_varlen, plan_attention
from train.recipe.schema import Model

BOUND = 2e-2
"""Largest relative error norm in bf16: rounding of a few hundred terms."""


def check_attention(device: str, length: int = 4096, width: int = 1024) -> list[CheckRow]:
    """Checks output and gradient of :class:`train.model.attention.Attention`, one and three documents.

    Three documents are checked with every kernel that the device has for them.

    Args:
        device: for example ``cuda``.
        length: positions S.
        width: of the model, eight heads together.
    """
    model = Model(width, 1, 8, 4, width, 128, length)
    documents_BS = (torch.arange(length) * 3 // length).int().expand(2, length)
    kernels = [DocumentKernel.flex] + [DocumentKernel.varlen] * (device == "cpu" or has_varlen())
    rows = []
    for what, ids, tried in (("one document", None, [None]), ("three documents", documents_BS, kernels)):
        wanted = _in_fp32(model, length, ids)
        for kernel in tried:
            label = what if kernel is None else f"{what}, {kernel.value}"
            found = _in_bf16(model, device, length, ids, kernel)
            for name, ours, theirs in zip(("output", "gradient of the input"), found, wanted, strict=True):
                error = float((ours.float().cpu() - theirs).norm() / theirs.norm())
                rows.append(deviation_row("attention", f"{name}, {label}, bf16 against fp32", error, BOUND))
    return rows


def _in_bf16(
    model: Model, device: str, length: int, ids: Tensor | None, kernel: DocumentKernel | None
) -> tuple[Tensor, Tensor]:
    attention, x_BSD, grad_BSD = _inputs(model, length)
    attention, x = attention.to(device), x_BSD.to(device).requires_grad_()
    plan = plan_attention(
        model,
        2,
        length,
        device=torch.device(device),
        dtype=torch.bfloat16,
        document_ids_BS=None if ids is None else ids.to(device),
        kernel=kernel,
    )
    with torch.autocast(device, torch.bfloat16):
        out, _ = attention(x, plan)
    out.backward(grad_BSD.to(device, out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def _in_fp32(model: Model, length: int, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs the same on the CPU: masked products per pair of positions, in fp32."""
    attention, x_BSD, grad_BSD = _inputs(model, length)
    x = x_BSD.requires_grad_()
    plan = plan_attention(
        model, 2, length, device=torch.device("cpu"), dtype=torch.float32, document_ids_BS=ids
    )
    out, _ = attention(x, plan)
    out.backward(grad_BSD)
    assert x.grad is not None
    return out.detach(), x.grad


def _inputs(model: Model, length: int) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    attention = Attention(model)
    return attention, torch.randn(2, length, model.d_model), torch.randn(2, length, model.d_model)
