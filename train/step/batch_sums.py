"""What a batch adds up to: each rank sums its microbatches, then one sum goes over the ranks.

Shapes: B sequences of a microbatch, S tokens per sequence, L layers, E experts, G domains.
"""

# ruff: noqa: N815  (shape suffixes)

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.model.decoder import DecoderOutput
from train.step.domain_counts import DomainCounts
from train.step.microbatch import Batch


@dataclass(frozen=True)
class BatchTotals:
    """A whole batch, over all microbatches and ranks; tensors, since reading them waits for the device."""

    loss: Tensor
    """Scalar, float64: mean cross-entropy, in nats per token."""
    tokens: int
    sequence_tokens: int
    """S, tokens of a sequence."""
    expert_tokens_LE: Tensor | None
    """int64: choices of each expert in each layer; None for a dense model."""
    domain_sums_GC: Tensor | None
    """See :func:`train.step.domain_counts.read_entries`; None where domains are not counted."""


class BatchSums:
    """Sums of a batch so far, on this rank.

    Args:
        domains: counts each domain's part of the batch; None: nothing is counted by domain.
    """

    def __init__(self, domains: DomainCounts | None) -> None:
        self.domains = domains
        self.clear()

    def clear(self) -> None:
        """Begins a batch."""
        self._losses: list[Tensor] = []
        self._tokens = self._sequence_tokens = 0
        self._expert_tokens_LE: Tensor | None = None
        if self.domains is not None:
            self.domains.clear()

    def add(self, batch: Batch, outputs: DecoderOutput, loss: Tensor) -> None:
        """Adds a microbatch.

        Args:
            batch: with ``input_ids`` [B, S]; counting by domain needs what :meth:`DomainCounts.add` does.
            outputs: of the decoder.
            loss: its mean cross-entropy, in nats per token.
        """
        self._losses.append(loss.detach())
        self._tokens += batch["input_ids"].numel()
        self._sequence_tokens = batch["input_ids"].shape[1]
        if outputs.expert_tokens_LE.numel():
            counts_LE, so_far_LE = outputs.expert_tokens_LE.detach(), self._expert_tokens_LE
            self._expert_tokens_LE = counts_LE.clone() if so_far_LE is None else so_far_LE + counts_LE
        if self.domains is not None:
            assert outputs.token_losses_BS is not None, "training has targets"
            self.domains.add(batch, outputs.token_losses_BS)

    def reduce(self) -> BatchTotals:
        """The batch over all ranks, which all call it; nothing is added to it afterwards."""
        loss, ranks = torch.stack(self._losses).double().mean(), 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(loss)
            loss /= ranks
            if self._expert_tokens_LE is not None:
                dist.all_reduce(self._expert_tokens_LE)
        return BatchTotals(
            loss=loss,
            tokens=self._tokens * ranks,
            sequence_tokens=self._sequence_tokens,
            expert_tokens_LE=self._expert_tokens_LE,
            domain_sums_GC=None if self.domains is None else self.domains.reduce(),
        )
