"""An exponential average of the weights, kept with the optimizer's state: sharded, saved and resumed with it.

DeepSeek-V3 keeps one to foresee how a model does after its learning rate has decayed (2024, arXiv 2412.19437,
section 3.2).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

AVERAGE = "average"
"""Its name in the state of each weight."""


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Makes an optimizer average the weights after each of its steps.

    The average begins as the weights after the first step. A step that the guard skips leaves it as it is.

    Args:
        optimizer: the optimizer.
        decay: share of the old average in the new one, in [0, 1).
    """

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, _args: Any, _keywords: Any) -> None:
        averages, weights = [], []
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if AVERAGE in state:
                averages.append(_shard(state[AVERAGE]))
                weights.append(_shard(p))
            else:
                state[AVERAGE] = p.detach().clone()
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - decay)

    optimizer.register_step_post_hook(update)


def _shard(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
