"""Domain counts: each domain's sequences, tokens, loss and digest in a batch, taken from the batch itself.

Every rank adds its microbatches; one all-reduce ends a batch. So the counts describe what was actually
trained on, not what was planned, and are the same under every layout.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.shards.digest import halves, hash_sequences, join, with_mask
from train.model.loss import IGNORE

# G domains, C columns, B sequences of a microbatch, S tokens per sequence.

COLUMNS = ("sequences", "targets", "loss", "positions", "upper", "lower")


@dataclass(frozen=True)
class DomainEntry:
    """One domain's part of a batch, over all ranks."""

    sequences: int
    targets: int
    """Tokens with a loss."""
    loss_sum: float
    """Cross-entropy summed over them, in nats."""
    position_sum: int
    """Sum of the sequences' positions in training."""
    digest: int
    """Digest of tokens and positions, see :mod:`data.shards.digest`."""


class DomainCounts:
    """Sums by domain of one batch."""

    def __init__(self, domains: int, device: torch.device, counts: bool = True) -> None:
        """Starts at zero.

        Args:
            domains: G, number of domains that ``domain_ids`` index.
            device: device of the batches.
            counts: this rank counts its sequences; False: another does, which shares them, and this one only
                adds the losses of its part.
        """
        self.counts = counts
        # float64 holds integers up to 2^53 exactly, so one all-reduce sums all columns.
        self._sums_GC = torch.zeros(domains, len(COLUMNS), dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Resets the sums for a new batch."""
        self._sums_GC.zero_()

    @torch.no_grad()
    def add(self, batch: dict[str, Tensor], token_losses_BS: Tensor) -> None:
        """Adds a microbatch of this rank.

        Args:
            batch: holds ``input_ids``, ``targets``, ``sample_positions`` and ``domain_ids``, and with a loss
                mask ``continues``.
            token_losses_BS: each token's cross-entropy, 0 where it has no loss; only of this rank's tokens.
        """
        input_ids_BS, positions_B = batch["input_ids"], batch["sample_positions"]
        is_target_BS = batch["targets"] != IGNORE
        targets_B = is_target_BS.sum(dim=1)
        if "continues" in batch:
            input_ids_BS = with_mask(input_ids_BS, batch["continues"] & ~is_target_BS)
        upper_B, lower_B = halves(hash_sequences(input_ids_BS, positions_B))
        counted = [torch.ones_like(upper_B), targets_B.double(), positions_B.double(), upper_B, lower_B]
        if not self.counts:
            counted = [torch.zeros_like(column_B) for column_B in counted]
        ones_B, targets_B, positions_B, upper_B, lower_B = counted
        losses_B = token_losses_BS.double().sum(dim=1)
        row_BC = torch.stack([ones_B, targets_B, losses_B, positions_B, upper_B, lower_B], dim=1)
        self._sums_GC.index_add_(0, batch["domain_ids"], row_BC)

    def reduce(self) -> Tensor:
        """Returns the sums over all ranks, float64 [G, C], for :func:`read_entries`; every rank calls it."""
        sums_GC = self._sums_GC.clone()
        if dist.is_initialized():
            dist.all_reduce(sums_GC)
        return sums_GC


def read_entries(sums_GC: Tensor) -> list[DomainEntry]:
    """Returns each domain's part of a batch, from sums in the order of :data:`COLUMNS`."""
    return [
        DomainEntry(int(count), int(targets), loss, int(positions), join(upper, lower))
        for count, targets, loss, positions, upper, lower in sums_GC.tolist()
    ]
