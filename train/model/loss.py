"""Chunked cross-entropy from hidden states, which never holds all T x V logits at once.

Gradients are computed in the forward pass, while a chunk's logits exist; the backward pass only scales
them. Memory is one chunk of logits plus the gradients that any loss has to return.

Shapes: T tokens, C tokens of a chunk, V vocabulary, D model.
"""

from typing import Any

import torch
from torch import Tensor

from train.cpu import softmax
from train.cpu.dispatch import with_cpu_version
from train.model import loss_kernel
from train.recipe.sizes import LOSS_CHUNK_TOKENS

IGNORE = -100
"""Target of a token that has no loss."""
HAS_MIXED_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()
"""On a GPU bf16 matrices are multiplied into an fp32 one (from torch 2.8)."""


def chunked_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    chunk_tokens: int | None = None,
    z_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` in nats.

    Args:
        hidden_TD: last hidden states.
        weight_VD: output projection.
        targets_T: token ids; :data:`IGNORE` has no loss and no gradient.
        chunk_tokens: rows of logits held at once; None: what suits the device.
        z_weight: weight of the z-loss, the squared log-sum-exp of a token's logits (Chowdhery et al. 2022,
            section 5).

    Returns:
        The sum over tokens, z-loss included (fp32, with gradients if grad mode is on), and each token's
        cross-entropy (fp32 [T], without gradient, 0 where ignored).
    """
    if chunk_tokens is None:
        chunk_tokens = LOSS_CHUNK_TOKENS[hidden_TD.device.type]
    result: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, chunk_tokens, z_weight, torch.is_grad_enabled()
    )
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets_T: Tensor, chunk: int, z: float, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        want_hidden = with_grad and ctx.needs_input_grad[0]
        want_weight = with_grad and ctx.needs_input_grad[1]
        losses_T = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        penalties_T = torch.empty_like(losses_T) if z else None
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_accumulated_in(weight)) if want_weight else None
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            # Cast here, so that the weight's gradient is accumulated over chunks and returned in fp32.
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        buffer_CV = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                hidden_CD = hidden[rows]
                logits_CV = torch.mm(hidden_CD, weight.t(), out=buffer_CV[: len(hidden_CD)])
                losses_C, penalties_C = _losses(logits_CV, targets_T[rows], z, with_grad)
                losses_T[rows] = losses_C
                if penalties_T is not None and penalties_C is not None:
                    penalties_T[rows] = penalties_C
                if grad_hidden is not None:
                    _write_product(grad_hidden[rows], logits_CV, weight)
                if grad_weight is not None:
                    _add_product(grad_weight, logits_CV.t(), hidden_CD)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses_T)
        total = losses_T.sum()
        return total if penalties_T is None else total + penalties_T.sum(), losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: nothing else holds these tensors, and autograd refuses a second backward pass.
        grad_hidden, grad_weight = ctx.saved_tensors
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(grads[0])
        return grad_hidden, grad_weight, None, None, None, None


def _losses(logits_CV: Tensor, targets_C: Tensor, z: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Returns each token's loss and z-loss; with ``with_grad``, overwrites the logits with their gradient."""
    if _is_for_kernel(logits_CV):
        return loss_kernel.losses_in_place(logits_CV, targets_C, IGNORE, z, with_grad)
    ignored_C = targets_C == IGNORE
    targets_C1 = targets_C.long().masked_fill(ignored_C, 0).unsqueeze(1)
    target_logits_C = logits_CV.gather(1, targets_C1).squeeze(1)
    log_sums_C = softmax_in_place(logits_CV, with_grad)
    losses_C = log_sums_C - target_logits_C
    if with_grad:
        # In fp32: for a bf16 p near 1, p - 1 would lose all its digits.
        of_target_C = torch.expm1(-losses_C)
        if z:
            slope_C = (
                2 * z * log_sums_C
            )  # of the z-loss by the log-sum-exp, whose gradient are the probabilities
            logits_CV.mul_((1 + slope_C).to(logits_CV.dtype).unsqueeze(1))
            of_target_C += slope_C * torch.exp(-losses_C)
        logits_CV.scatter_(1, targets_C1, of_target_C.to(logits_CV.dtype).unsqueeze(1))
        logits_CV.masked_fill_(ignored_C.unsqueeze(1), 0.0)
    penalties_C = (z * log_sums_C.square()).masked_fill_(ignored_C, 0.0).float() if z else None
    return losses_C.masked_fill_(ignored_C, 0.0).float(), penalties_C


@with_cpu_version(softmax.softmax_in_place)
def softmax_in_place(logits_CV: Tensor, write: bool) -> Tensor:
    """Returns each row's log-sum-exp, in fp32 at least; with ``write``, turns logits into probabilities."""
    logits = logits_CV.to(_accumulated_in(logits_CV))
    probs_CV = logits.softmax(dim=-1)
    # Computed from the largest logit and its probability, so it neither underflows nor overflows.
    log_sums_C = logits.amax(dim=-1) - probs_CV.amax(dim=-1).log()
    if write:
        logits_CV.copy_(probs_CV)
    return log_sums_C


def _is_for_kernel(logits_CV: Tensor) -> bool:
    """Returns whether one kernel computes the loss; torch.compile fuses passes itself."""
    return logits_CV.is_cuda and logits_CV.dtype in loss_kernel.DTYPES and not torch.compiler.is_compiling()


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Computes ``out[:] = left @ right``."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Computes ``total += left @ right``, accumulating in ``total``'s precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif HAS_MIXED_PRODUCTS and left.is_cuda:
        # The product adds to the total itself: neither a product of its own, V x D, nor its rounding.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _accumulated_in(tensor: Tensor) -> torch.dtype:
    """Returns fp32, or the tensor's own precision if that is higher."""
    return torch.promote_types(tensor.dtype, torch.float32)
