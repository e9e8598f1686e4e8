"""Sums of a batch: each rank adds up its microbatches, then they are reduced over ranks.

What else all ranks must agree on once per batch rides in the same sum: an all-reduce of its own would cost
thousands of ranks a round trip each.

Shapes: B sequences of a microbatch, S tokens per sequence, L layers, E experts, G domains.
"""

# ruff: noqa: N815  (shape suffixes)

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.model.decoder import DecoderOutput
from train.model.loss import IGNORE
from train.step.domain_counts import DomainCounts
from train.step.microbatch import Batch


@dataclass(frozen=True)
class BatchTotals:
    """Totals of a batch over all microbatches and ranks; tensors, since reading them waits for the device."""

    loss: Tensor
    """Scalar, float64: mean cross-entropy, in nats per token."""
    flags: Tensor
    """float64, one per flag given to :meth:`BatchSums.reduce`: how many ranks raised it."""
    tokens: int
    sequence_tokens: int
    """S, tokens per sequence."""
    expert_tokens_LE: Tensor | None
    """int64: tokens per layer and expert; None for a dense model."""
    domain_sums_GC: Tensor | None
    """See :func:`train.step.domain_counts.read_entries`; None if domains are not counted."""


class BatchSums:
    """Running sums of a batch on this rank.

    Args:
        domains: counts each domain's part of the batch; None: no counts by domain.
        sharing: ranks that share each sequence.
    """

    def __init__(self, domains: DomainCounts | None, sharing: int = 1) -> None:
        self.domains, self.sharing = domains, sharing
        self.clear()

    def clear(self) -> None:
        """Resets the sums for a new batch."""
        self._losses: list[Tensor] = []
        self._tokens = self._sequence_tokens = 0
        self._expert_tokens_LE: Tensor | None = None
        if self.domains is not None:
            self.domains.clear()

    def add(self, batch: Batch, outputs: DecoderOutput, loss: Tensor) -> None:
        """Adds a microbatch.

        Args:
            batch: holds ``input_ids`` [B, S], of whole sequences, and for counts by domain the keys of
                :meth:`DomainCounts.add`.
            outputs: the decoder's outputs.
            loss: mean cross-entropy of the microbatch, in nats per token.
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

    @property
    def losses(self) -> Tensor:
        """Mean cross-entropy of each microbatch of this rank, [N], in nats per token."""
        return torch.stack(self._losses)

    def reduce(self, flags: Sequence[bool | Tensor] = ()) -> BatchTotals:
        """Returns the totals over all ranks; every rank calls it, once per batch.

        Args:
            flags: what this rank tells the others; equally many on every rank. Tensors are 0 or 1.
        """
        loss, ranks = self.losses.double().mean(), 1
        # Filled on the device: a copy from the host would wait for it.
        raised = [
            flag.to(loss) if isinstance(flag, Tensor) else torch.full_like(loss, float(flag))
            for flag in flags
        ]
        sums = torch.stack([loss, *raised])
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(sums)
            if self._expert_tokens_LE is not None:
                dist.all_reduce(self._expert_tokens_LE)
        return BatchTotals(
            loss=sums[0] / ranks,
            flags=sums[1:],
            tokens=self._tokens * ranks // self.sharing,
            sequence_tokens=self._sequence_tokens,
            expert_tokens_LE=self._expert_tokens_LE,
            domain_sums_GC=None if self.domains is None else self.domains.reduce(),
        )


def targets_per_sequence(targets_BS: Tensor) -> Tensor:
    """Returns the mean number of targets of the global batch's sequences, fp32; every rank calls it.

    A batch without any has the mean of one target: its loss is 0, not 0 / 0.

    Args:
        targets_BS: targets of all sequences of this rank, on its device; those that ranks share count on
            each of them.
    """
    counts = torch.stack([(targets_BS != IGNORE).sum(), targets_BS.new_tensor(len(targets_BS))])
    if dist.is_initialized():
        dist.all_reduce(counts)
    targets, sequences = counts.unbind()
    return targets.clamp(min=1).float() / sequences
