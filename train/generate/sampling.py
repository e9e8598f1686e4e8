"""The next token from logits: greedy, or drawn from a distribution that was cut and sharpened.

Shapes: B sequences, V vocabulary, N tokens so far.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; each step narrows what the one before left, in this order."""

    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it if positive, multiplied if negative (Keskar et al.
    2019, section 4.1). 1: none."""
    temperature: float = 0.0
    """Logits are divided by it. 0: the likeliest token, and nothing below applies."""
    top_k: int | None = None
    """Only the K likeliest tokens (Fan et al. 2018)."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Only tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    seed: int = 0
    """Of the draws."""


def next_tokens(logits_BV: Tensor, seen_BN: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draws a token for each sequence.

    Args:
        logits_BV: of the next token, any precision.
        seen_BN: tokens so far, -1 where there is none.
        sampling: how to draw.
        generator: source of the draws, on the CPU.

    Returns:
        Token ids [B].
    """
    logits_BV = _penalize(logits_BV.float(), seen_BN, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    narrowed_BV = narrow(logits_BV / sampling.temperature, sampling)
    probabilities_BV = narrowed_BV.softmax(dim=-1).cpu()
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0].to(logits_BV.device)


def narrow(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf for the tokens that top-k, top-p and min-p leave out."""
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        likelihood_BV = sorted_BV.softmax(dim=-1)
        # A token stays while those before it have not yet reached the sum; so the first always does.
        beyond_BV = likelihood_BV.cumsum(dim=-1) - likelihood_BV >= sampling.top_p
        beyond_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
        logits_BV = logits_BV.masked_fill(beyond_BV, -torch.inf)
    if sampling.min_p is not None:
        likelihood_BV = logits_BV.softmax(dim=-1)
        least_B1 = sampling.min_p * likelihood_BV.amax(dim=-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(likelihood_BV < least_B1, -torch.inf)
    return logits_BV


def _penalize(logits_BV: Tensor, seen_BN: Tensor, penalty: float) -> Tensor:
    if penalty == 1:
        return logits_BV
    # One column more than there are tokens takes what was never seen.
    occurred_BV = torch.zeros(logits_BV.shape[0], logits_BV.shape[1] + 1, dtype=torch.bool)
    occurred_BV.scatter_(1, seen_BN.cpu() % occurred_BV.shape[1], True)
    occurred_BV = occurred_BV[:, :-1].to(logits_BV.device)
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(occurred_BV, penalized_BV, logits_BV)
