"""The experts' GLUs with all of their products in block-scaled fp8, forward and backward.

Every product's operands are quantised along the dimension that it sums over, from bf16 (on a CPU also from
fp32), as in DeepSeek-V3 (section 3.3, figure 6): activations and gradients in tiles of a token's row for
outputs and their gradients, in tiles of tokens for gradients of weights. Activations are kept for the
backward pass as without fp8, so nothing is rounded twice. SiLU and the products of gates and ups are computed
in the operands' precision.

A row's result depends on that row only. Gradients of weights depend, by rounding, on which tokens of an
expert come together in a tile, and so on layout and microbatch.

Shapes: R rows sorted by expert, D model, F hidden, E experts of this rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.model.scaled_products import Products


def scaled_glu(
    x_RD: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    products: Products,
    *,
    keeps_gates: bool = True,
) -> Tensor:
    """:func:`train.model.experts.grouped_glu` in fp8.

    Args:
        x_RD: rows sorted by expert; rows that no expert has may be anything, and stay undefined.
        w1_EFD: gate projections; D and F are multiples of a tile.
        v1_EFD: up projections.
        w2_EFD: down projections, not transposed.
        products: precision, and each expert's rows.
        keeps_gates: the backward pass gets gate and up, instead of computing them again.

    Returns:
        [R, D], in autocast's precision if autocast is on.
    """
    result: Tensor = _ScaledGlu.apply(x_RD, w1_EFD, v1_EFD, w2_EFD, products, keeps_gates)
    return result


class _ScaledGlu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor, products: Products, keeps_gates: bool
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.weight_dtype, ctx.products = w1.dtype, products
        x, w1, v1, w2 = [tensor.to(dtype) for tensor in (x, w1, v1, w2)]
        gate_RF, up_RF = _gates(products, x, w1, v1)
        ctx.save_for_backward(x, w1, v1, w2, *((gate_RF, up_RF) if keeps_gates else ()))
        product_RF = products.format.rows(functional.silu(gate_RF).mul_(up_RF))
        return products.by_matrices(product_RF, products.format.turned(w2), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, v1, w2, *gates = ctx.saved_tensors
        products: Products = ctx.products
        tiles, dtype = products.format, x.dtype
        wants_x, *wants_weights, _, _ = ctx.needs_input_grad
        gate_RF, up_RF = gates or _gates(products, x, w1, v1)
        grad_RD = grads[0].contiguous()
        activated_RF = functional.silu(gate_RF)
        grad_w1 = grad_v1 = grad_w2 = grad_x = None
        if wants_weights[2]:
            columns = (products.columns(activated_RF * up_RF), products.columns(grad_RD))
            grad_w2 = products.by_rows(*columns, ctx.weight_dtype)
        grad_product_RF = products.by_matrices(tiles.rows(grad_RD), tiles.weights(w2), dtype)
        grad_up_RF = activated_RF.mul_(grad_product_RF)
        grad_gate_RF = torch.ops.aten.silu_backward(grad_product_RF.mul_(up_RF), gate_RF)
        if wants_weights[0] or wants_weights[1]:
            columns_of_x = products.columns(x)
        if wants_weights[0]:
            grad_w1 = products.by_rows(products.columns(grad_gate_RF), columns_of_x, ctx.weight_dtype)
        if wants_weights[1]:
            grad_v1 = products.by_rows(products.columns(grad_up_RF), columns_of_x, ctx.weight_dtype)
        if wants_x:
            grad_x = products.by_matrices(tiles.rows(grad_gate_RF), tiles.turned(w1), dtype)
            grad_x += products.by_matrices(tiles.rows(grad_up_RF), tiles.turned(v1), dtype)
        return grad_x, grad_w1, grad_v1, grad_w2, None, None


def _gates(products: Products, x: Tensor, w1: Tensor, v1: Tensor) -> tuple[Tensor, Tensor]:
    x_RD = products.format.rows(x)
    gate_RF, up_RF = (products.by_matrices(x_RD, products.format.weights(w), x.dtype) for w in (w1, v1))
    return gate_RF, up_RF
