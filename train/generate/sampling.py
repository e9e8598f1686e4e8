"""Sampling of the next token from logits: greedy, or from a truncated and sharpened distribution.

Shapes: B sequences, V vocabulary, N tokens so far.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The sampling settings; each step applies to the result of the previous one, in this order."""

    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it if positive, multiplied if negative (Keskar et al.
    2019, section 4.1). 1: none."""
    temperature: float = 0.0
    """Logits are divided by it. 0: greedy decoding, and nothing below applies."""
    top_k: int | None = None
    """Only the K most likely tokens (Fan et al. 2018)."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Only tokens at least this fraction as likely as the most likely (Nguyen et al. 2024)."""
    seed: int = 0
    """Random seed."""


def next_tokens(logits_BV: Tensor, seen_BN: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Samples a token for each sequence.

    Args:
        logits_BV: logits of the next token, any precision.
        seen_BN: tokens so far, -1 for padding.
        sampling: the sampling settings.
        generator: random generator, on the CPU.

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
    """Sets the logits of tokens that top-k, top-p and min-p exclude to -inf."""
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        likelihood_BV = sorted_BV.softmax(dim=-1)
        # A token is kept if the more likely ones have not yet reached top_p, so the first always is.
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
    # An extra column collects the padding.
    occurred_BV = torch.zeros(logits_BV.shape[0], logits_BV.shape[1] + 1, dtype=torch.bool)
    occurred_BV.scatter_(1, seen_BN.cpu() % occurred_BV.shape[1], True)
    occurred_BV = occurred_BV[:, :-1].to(logits_BV.device)
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(occurred_BV, penalized_BV, logits_BV)
