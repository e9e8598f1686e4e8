"""Work on rank 0 for all ranks: run something there and broadcast the result, or log a line once."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from train.recipe.errors import UserError
from train.recipe.topology import Topology
from train.record.log import progress

Result = TypeVar("Result")


def run_on_rank_0(topology: Topology, work: Callable[[], Result]) -> Result:
    """Runs something on rank 0 and gives every rank its result, or its error."""
    if topology.world_size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if topology.is_main:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def log_on_rank_0(topology: Topology, line: str, level: int = logging.INFO) -> None:
    """Logs a line of the run's progress, once."""
    if topology.is_main:
        progress.log(level, line)
