"""The experts: GLUs over rows sorted by expert, as grouped matrix products.

torch's grouped product (``torch.nn.functional.grouped_mm``, from 2.10) runs all experts in one kernel, and
reads their numbers of rows on the device, so that the host need not wait for them. Earlier versions of torch
run one product per expert. On a CPU :mod:`train.cpu.grouped_glu` replaces both.

Shapes: R rows sorted by expert, D model, F hidden, E experts of this rank.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.cpu import grouped_glu as cpu_grouped_glu
from train.cpu.dispatch import with_cpu_version
from train.model import megablocks_ops
from train.model.recompute import is_remade, kept, remade
from train.model.scaled_glu import scaled_glu
from train.model.scaled_products import Products
from train.recipe.schema import ExpertPrecision, Recompute

megablocks_ops.install()

from megablocks.layers import mpu  # noqa: E402  (needs the modules that install provides)
from megablocks.layers.glu import GroupedGLU  # noqa: E402
from megablocks.layers.mlp import resolve_dtensor  # noqa: E402

HAS_GROUPED_MM = hasattr(functional, "grouped_mm")

Spans = list[slice]
"""Each expert's rows, known to the host."""


class Experts(GroupedGLU):
    """MegaBlocks' GLU experts: its parameters ``w1``, ``v1``, ``w2``, each [E x F, D], and its interface."""

    precision = ExpertPrecision.same
    """Of the products: see :mod:`train.model.scaled_glu`."""

    def forward(self, x_RD: Tensor, tokens_E: Tensor) -> Tensor:
        """Runs each row through its expert; ``tokens_E`` are the rows of each expert, on any device."""
        experts = mpu.experts_per_rank(self.args)
        w1_EFD, v1_EFD, w2_EFD = [
            resolve_dtensor(self.scale_grad(weight)).view(experts, -1, self.args.hidden_size)
            for weight in (self.w1, self.v1, self.w2)
        ]
        device = x_RD.device.type
        if is_remade(Recompute.elementwise) and torch.is_autocast_enabled(device):
            # Cast here, so that the copies are made again too.
            dtype = torch.get_autocast_dtype(device)
            w1_EFD, v1_EFD, w2_EFD = (
                remade(Recompute.elementwise, Tensor.to, w, dtype) for w in (w1_EFD, v1_EFD, w2_EFD)
            )
        keeps_gates = not is_remade(Recompute.gates)
        if self.precision is not ExpertPrecision.same:
            products = Products(self.precision, kept(lambda: spans_of(tokens_E.cpu().cumsum(0))))
            return scaled_glu(x_RD, w1_EFD, v1_EFD, w2_EFD, products, keeps_gates=keeps_gates)
        return grouped_glu(x_RD, w1_EFD, v1_EFD, w2_EFD, tokens_E, keeps_gates=keeps_gates)


@with_cpu_version(cpu_grouped_glu.grouped_glu)
def grouped_glu(
    x_RD: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    tokens_E: Tensor,
    *,
    keeps_gates: bool = True,
) -> Tensor:
    """``(silu(x w1^T) * (x v1^T)) w2`` with each row's own expert.

    Args:
        x_RD: rows sorted by expert.
        w1_EFD: gate projections; under autocast all weights are cast here, once.
        v1_EFD: up projections.
        w2_EFD: down projections, not transposed.
        tokens_E: rows of each expert, zero is allowed; they sum to R, since rows beyond would not be written.
        keeps_gates: the backward pass gets gate and up, instead of computing them again.

    Returns:
        [R, D], in autocast's precision if autocast is on.
    """
    ends_E = tokens_E.cumsum(0).int().to(x_RD.device, non_blocking=True)
    is_on_device = HAS_GROUPED_MM or torch.compiler.is_compiling()  # no graph takes what the host knows
    spans = None if is_on_device else kept(lambda: spans_of(tokens_E.cpu().cumsum(0)))
    result: Tensor = _GroupedGlu.apply(x_RD, w1_EFD, v1_EFD, w2_EFD, ends_E, spans, keeps_gates)
    return result


class _GroupedGlu(torch.autograd.Function):
    """Saves gate and up at most, and recomputes their product in the backward pass, as MegaBlocks does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        v1: Tensor,
        w2: Tensor,
        ends_E: Tensor,
        spans: Spans | None,
        keeps_gates: bool,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.weight_dtype = w1.dtype
        x, w1, v1, w2 = [tensor.to(dtype) for tensor in (x, w1, v1, w2)]
        ctx.spans = spans
        gate_RF = grouped_product(x, w1.mT, ends_E, spans)
        up_RF = grouped_product(x, v1.mT, ends_E, spans)
        ctx.save_for_backward(x, w1, v1, w2, ends_E, *((gate_RF, up_RF) if keeps_gates else ()))
        return grouped_product(functional.silu(gate_RF).mul_(up_RF), w2, ends_E, spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, v1, w2, ends_E, *gates = ctx.saved_tensors
        wants_x, *wants_weights, _, _, _ = ctx.needs_input_grad
        product = functools.partial(grouped_product, ends_E=ends_E, spans=ctx.spans)
        gate_RF, up_RF = gates or (product(x, w1.mT), product(x, v1.mT))
        grad_RD = grads[0].contiguous()
        activated_RF = functional.silu(gate_RF)
        grad_w1 = grad_v1 = grad_w2 = grad_x = None
        if wants_weights[2]:
            grad_w2 = product((activated_RF * up_RF).t(), grad_RD).to(ctx.weight_dtype)
        grad_product_RF = product(grad_RD, w2.mT)
        grad_up_RF = activated_RF.mul_(grad_product_RF)
        # In place, and gates that were made again go before the products, whose results need memory.
        grad_gate_RF = grad_product_RF.mul_(up_RF)
        torch.ops.aten.silu_backward.grad_input(grad_gate_RF, gate_RF, grad_input=grad_gate_RF)
        del activated_RF, grad_product_RF, gate_RF, up_RF, gates
        if wants_weights[0]:
            grad_w1 = product(grad_gate_RF.t(), x).to(ctx.weight_dtype)
        if wants_weights[1]:
            grad_v1 = product(grad_up_RF.t(), x).to(ctx.weight_dtype)
        if wants_x:
            grad_x = product(grad_gate_RF, w1)
            del grad_gate_RF
            grad_x.add_(product(grad_up_RF, v1))
        return grad_x, grad_w1, grad_v1, grad_w2, None, None, None


def grouped_product(a: Tensor, b: Tensor, ends_E: Tensor, spans: Spans | None = None) -> Tensor:
    """Matrix products of groups, one for each expert.

    Args:
        a: rows sorted by expert, [R, D]; or the same transposed, [D, R].
        b: with rows in ``a``, one matrix per expert, [E, D, N]; with transposed rows, other rows [R, N].
        ends_E: int32, on the operands' device: where each expert's rows end.
        spans: the same on the host, if it is known there.

    Returns:
        [R, N], each row times its expert's matrix; or [E, D, N], each expert's product of its rows.
    """
    if not HAS_GROUPED_MM or not (_is_accepted(a) and _is_accepted(b)):
        return product_by_product(a, b, spans_of(ends_E) if spans is None else spans)
    out: Tensor = functional.grouped_mm(a, b, offs=ends_E)  # type: ignore[attr-defined, unused-ignore]
    return out


def _is_accepted(operand: Tensor) -> bool:
    """Returns whether grouped_mm takes an operand: no float64, and rows of whole 16 bytes."""
    return operand.dtype != torch.float64 and max(operand.stride()[-2:]) * operand.itemsize % 16 == 0


def spans_of(ends_E: Tensor) -> Spans:
    """Returns each expert's rows by where they end; the host waits for that."""
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def product_by_product(a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """:func:`grouped_product` as one product per expert."""
    if b.ndim == 2:
        out = a.new_empty(len(spans), len(a), b.shape[1])
        for rows, target in zip(spans, out, strict=True):
            torch.mm(a[:, rows], b[rows], out=target)
    else:
        out = a.new_empty(len(a), b.shape[2])
        for rows, matrix in zip(spans, b, strict=True):
            torch.mm(a[rows], matrix, out=out[rows])
    return out
