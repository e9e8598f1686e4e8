"""GLU experts on a CPU, expert by expert; faster there than torch's grouped products.

An expert's rows go through all of its products and element-wise passes while they are in the cache. Cheap
results are recomputed in the backward pass, since reading them back from memory would take longer. In bf16
the rows of a product are padded to a multiple of 64: oneDNN compiles a kernel for every new shape, which
takes some thirty times as long as running it, and every step has new counts of tokens.

Shapes: R routed rows sorted by expert, P rows of one expert and its padding, D model, F hidden, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PADDED_ROWS = 64
"""In bf16, the rows of a product are padded to a multiple of this."""


def grouped_glu(
    x_RD: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    tokens_E: Tensor,
    *,
    keeps_gates: bool = True,
) -> Tensor:
    """:func:`train.model.experts.grouped_glu`, expert by expert; ``tokens_E`` is on the CPU."""
    result: Tensor = _CpuGroupedGlu.apply(x_RD, w1_EFD, v1_EFD, w2_EFD, tokens_E, keeps_gates)
    return result


class _CpuGroupedGlu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor, batch_sizes: Tensor, keeps_gates: bool
    ) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        ctx.weight_dtype = w1.dtype
        x, w1, v1, w2 = (tensor.to(dtype) for tensor in (x, w1, v1, w2))
        spans = _Spans.of(batch_sizes, dtype)
        gates, ups = (spans.hidden_like(x, w1.shape[1], is_kept=keeps_gates) for _ in range(2))
        product = x.new_empty(max(spans.padded, default=0), w1.shape[1])
        out = spans.rows_like(x)
        for x_PD, out_PD, gate_PF, up_PF, w1_DF, v1_DF, w2_FD in zip(
            spans.windows(x),
            spans.windows(out),
            gates,
            ups,
            spans.of_busy(w1.mT),
            spans.of_busy(v1.mT),
            spans.of_busy(w2),
            strict=True,
        ):
            torch.mm(x_PD, w1_DF, out=gate_PF)
            torch.mm(x_PD, v1_DF, out=up_PF)
            product_PF = product[: len(gate_PF)]
            torch.ops.aten.silu.out(gate_PF, out=product_PF)
            torch.mm(product_PF.mul_(up_PF), w2_FD, out=out_PD)
        ctx.save_for_backward(x, w1, v1, w2, *(gates + ups if keeps_gates else ()))
        ctx.spans = spans
        return out[: len(x)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, v1, w2, *kept = ctx.saved_tensors
        spans: _Spans = ctx.spans
        gates, ups = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        if not kept:
            gates, ups = (spans.hidden_like(x, w1.shape[1], is_kept=False) for _ in range(2))
        grad = grads[0].contiguous()
        grad_x = spans.rows_like(x)
        grad_weights = [torch.empty_like(w1, dtype=ctx.weight_dtype) for _ in range(3)]
        for expert in spans.idle:
            for grad_EFD in grad_weights:
                grad_EFD[expert] = 0.0
        scratch = x.new_empty(4, max(spans.padded, default=0), w1.shape[1])
        cast_FD = w1.new_empty(w1.shape[1:]) if w1.dtype != ctx.weight_dtype else None
        for size, x_PD, grad_PD, grad_x_PD, gate_PF, up_PF, w1_FD, v1_FD, w2_DF, *grads_FD in zip(
            spans.sizes,
            spans.windows(x),
            spans.windows(grad),
            spans.windows(grad_x),
            gates,
            ups,
            spans.of_busy(w1),
            spans.of_busy(v1),
            spans.of_busy(w2.mT),
            *(spans.of_busy(grad_EFD) for grad_EFD in grad_weights),
            strict=True,
        ):
            padded = len(gate_PF)
            if not kept:
                torch.mm(x_PD, w1_FD.t(), out=gate_PF)
                torch.mm(x_PD, v1_FD.t(), out=up_PF)
            dgate_PF, dup_PF, product_PF, dproduct_PF = scratch.narrow(1, 0, padded).unbind(0)
            torch.mm(grad_PD, w2_DF, out=dproduct_PF)
            torch.ops.aten.silu.out(gate_PF, out=product_PF)
            torch.mul(dproduct_PF, product_PF, out=dup_PF)
            product_PF.mul_(up_PF)
            dproduct_PF.mul_(up_PF)
            torch.ops.aten.silu_backward.grad_input(dproduct_PF, gate_PF, grad_input=dgate_PF)
            if size < padded:  # padding rows belong to the next expert and must not count here
                scratch[:3, size:padded] = 0.0
            for left_PF, right_PD, target_FD in zip(
                (dgate_PF, dup_PF, product_PF), (x_PD, x_PD, grad_PD), grads_FD, strict=True
            ):
                if cast_FD is None:
                    torch.mm(left_PF.t(), right_PD, out=target_FD)
                else:
                    target_FD.copy_(torch.mm(left_PF.t(), right_PD, out=cast_FD))
            torch.mm(dgate_PF, w1_FD, out=grad_x_PD)
            grad_x_PD.addmm_(dup_PF, v1_FD)
        return grad_x[: len(x)], *grad_weights, None, None


class _Spans(NamedTuple):
    """The span of rows of each busy expert, in the sorted rows and in buffers with room for padding.

    A span of the sorted rows is padded with the next expert's rows. Results written there are overwritten
    when the next expert is computed, hence the ascending order.
    """

    busy: list[int]
    """Experts that have rows; the lists below have an entry for each of these."""
    idle: list[int]
    sizes: list[int]
    padded: list[int]
    overhang: int
    """Rows by which the last span may exceed the end."""

    @classmethod
    def of(cls, batch_sizes_E: Tensor, dtype: torch.dtype) -> "_Spans":
        sizes = [int(size) for size in batch_sizes_E.tolist()]
        unit = PADDED_ROWS if dtype == torch.bfloat16 else 1
        busy = [expert for expert, size in enumerate(sizes) if size]
        idle = [expert for expert, size in enumerate(sizes) if not size]
        padded = [-(-sizes[expert] // unit) * unit for expert in busy]
        return cls(busy, idle, [sizes[expert] for expert in busy], padded, unit - 1)

    def windows(self, x_RD: Tensor) -> list[Tensor]:
        """Returns the padded spans of ``x_RD``; one that exceeds the last row is copied and zero-padded."""
        starts = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
        windows = []
        for start, length in zip(starts, self.padded, strict=False):
            missing = start + length - len(x_RD)
            rows_PD = x_RD[start : start + length]
            windows.append(functional.pad(rows_PD, (0, 0, 0, missing)) if missing > 0 else rows_PD)
        return windows

    def hidden_like(self, x_RD: Tensor, hidden: int, *, is_kept: bool) -> tuple[Tensor, ...]:
        """Returns uninitialised rows of each busy expert, or if none is kept, the same rows for all."""
        if is_kept:
            return x_RD.new_empty(sum(self.padded), hidden).split(self.padded)
        rows_PF = x_RD.new_empty(max(self.padded, default=0), hidden)
        return tuple(rows_PF[:padded] for padded in self.padded)

    def of_busy(self, weights_E: Tensor) -> list[Tensor]:
        """Returns the busy experts' matrices."""
        matrices = weights_E.unbind(0)
        return [matrices[expert] for expert in self.busy]

    def rows_like(self, x_RD: Tensor) -> Tensor:
        """Returns an uninitialised tensor like ``x_RD`` with room for the last span's padding."""
        return x_RD.new_empty(len(x_RD) + self.overhang, x_RD.shape[1])
