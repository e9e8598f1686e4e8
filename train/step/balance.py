"""The scope of the balance loss: tokens of a microbatch, a rank, an expert group or the global batch.

Ranks that share sequences have one microbatch, and count as one rank.

A fifth scope, each sequence, needs no others' counts: see :func:`train.model.moe.sequence_balance`.

The loss is E x sum over experts of share x mean score (Fedus et al. 2021, eq. 4). The mean score carries the
gradient, and the loss is linear in it; the share is a count without a gradient. So if every microbatch uses
the shares of the global batch, the mean of the losses is exactly the loss of the global batch (Qiu et al.
2025, arXiv 2501.11873, section 3).

The shares of a whole batch are needed before the first backward pass. Qiu et al. use the counts accumulated
so far; here a first pass routes all microbatches without gradients. This is exact however the batch is split
and costs one more forward pass (a third of forward and backward, a quarter with recomputation). With one
microbatch per rank it is not needed: its counts, 8 L E bytes, are summed over the ranks after the forward
pass.

Shapes: L layers, E experts.
"""

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from composer.core import State
from torch import Tensor

from train.model.moe import MoE
from train.recipe.schema import BalanceScope
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch, split


class BalanceCounts:
    """Supplies the balance loss with expert counts over the recipe's scope.

    Args:
        model: the model to train, already sharded.
        scope: the recipe's ``model.moe.balance_scope``.
        microbatches: microbatches per rank and batch.
    """

    def __init__(self, model: LanguageModel, scope: BalanceScope, microbatches: int) -> None:
        self.model, self.scope = model, scope
        self.needs_first_pass = microbatches > 1 and scope in (BalanceScope.rank, BalanceScope.global_batch)
        context = model.decoder.context
        self.sharing = None if context is None else context.group
        pipeline = model.decoder.pipeline
        # Without more, the model takes the counts of a microbatch, of all ranks that share its sequences.
        if self.needs_first_pass or not dist.is_initialized():
            return
        moes = [module for module in model.decoder.modules() if isinstance(module, MoE)]
        if not moes:  # a stage of dense layers
            return
        first = moes[0].experts.args
        if scope is BalanceScope.expert_group and first.moe_expert_model_parallelism:
            # The larger of the two groups has the other in it.
            if context is None or first.expert_parallel_group.size() >= context.ranks:
                model.reduce_counts = functools.partial(_sum_over, first.expert_parallel_group)
        elif scope is BalanceScope.global_batch:
            # Of a pipeline, those that have the same layers.
            model.reduce_counts = functools.partial(_sum_over, None if pipeline is None else pipeline.peers)

    def count_batch(self, parts: Sequence[Batch]) -> None:
        """Routes all microbatches, if the scope needs their counts before the first one."""
        if not self.needs_first_pass:
            return
        counts_LE = torch.stack([self.model.count_choices(part) for part in parts]).sum(dim=0)
        if self.scope is BalanceScope.global_batch and dist.is_initialized():
            dist.all_reduce(counts_LE)
        elif self.sharing is not None:
            dist.all_reduce(counts_LE, group=self.sharing)
        self.model.reduce_counts = functools.partial(_given, counts_LE)


def microbatches_of(state: State) -> list[Batch]:
    """Returns the microbatches that Composer is about to train on, on the device."""
    assert state.dataloader is not None and state.device_train_microbatch_size is not None
    size = int(state.device_train_microbatch_size)
    return split(state.device.batch_to_device(state.batch), size)


def _sum_over(group: dist.ProcessGroup | None, counts_LE: Tensor) -> Tensor:
    """Returns the counts summed over the ranks of a group; None: over all ranks."""
    total_LE = counts_LE.clone()
    dist.all_reduce(total_LE, group=group)
    return total_LE


def _given(batch_counts_LE: Tensor, _counts_LE: Tensor) -> Tensor:
    """Returns the batch's counts in place of the microbatch's."""
    return batch_counts_LE
