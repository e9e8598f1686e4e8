"""Cross-entropy from hidden states, chunk by chunk, so that the T x V logits are never held at once.

Gradients are made in the forward pass, while a chunk's logits exist: the backward pass only scales
them. Memory is one chunk of logits and the gradients that any loss would have to return.

Shapes: T tokens, C tokens of a chunk, V vocabulary, D model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
"""Target of a token that has no loss."""


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` in nats.

    Args:
        hidden_TD: last hidden states.
        weight_VD: output projection.
        targets_T: token ids; :data:`IGNORE` has no loss and no gradient.
        chunk_tokens: rows of logits held at once.

    Returns:
        The sum over tokens (fp32, with gradients where grad mode is on) and each token's loss
        (fp32 [T], without gradient, 0 where ignored).
    """
    result: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, chunk_tokens, torch.is_grad_enabled()
    )
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  (autograd.Function takes no keywords)
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        want_hidden = with_grad and ctx.needs_input_grad[0]
        want_weight = with_grad and ctx.needs_input_grad[1]
        losses_T = torch.empty(hidden_TD.shape[0], dtype=torch.float32, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        device = hidden_TD.device.type
        if torch.is_autocast_enabled(device):
            # Cast in here, so that the weight's gradient is summed over chunks and returned in fp32.
            dtype = torch.get_autocast_dtype(device)
            hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for start in range(0, hidden_TD.shape[0], chunk):
                rows = slice(start, start + chunk)
                hidden_CD = hidden_TD[rows]
                logits_CV = functional.linear(hidden_CD, weight_VD).float()
                losses_T[rows], grad_CV = _softmax_loss(logits_CV, targets_T[rows])
                grad_CV = grad_CV.to(hidden_CD.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_CV @ weight_VD
                if grad_weight is not None:
                    grad_weight += grad_CV.t() @ hidden_CD
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum(), losses_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place: nobody else holds them, and a second backward pass is refused by autograd.
        grad_hidden, grad_weight = ctx.saved_tensors
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(grads[0])
        return grad_hidden, grad_weight, None, None, None


def _softmax_loss(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss and its gradient with respect to the logits."""
    ignored_C1 = (targets_C == IGNORE).unsqueeze(1)
    targets_C1 = targets_C.long().unsqueeze(1).masked_fill(ignored_C1, 0)
    log_probs_CV = functional.log_softmax(logits_CV, dim=-1)
    losses_C1 = -log_probs_CV.gather(1, targets_C1).masked_fill_(ignored_C1, 0.0)
    grad_CV = log_probs_CV.exp_()
    grad_CV.scatter_add_(1, targets_C1, torch.full_like(losses_C1, -1.0))
    if ignored_C1.any():
        grad_CV.masked_fill_(ignored_C1, 0.0)
    return losses_C1.squeeze(1), grad_CV
