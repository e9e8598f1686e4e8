"""Which rank of how many this process is, and on how many cores; reads the launcher's variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from train.recipe.errors import UserError


@dataclass(frozen=True)
class Topology:
    """This process among all; `composer`, torchrun and SLURM's srun all set the same variables."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Topology":
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process where they are unset.

        Raises:
            UserError: if a variable is not a number or the rank is not below the world size.
        """
        variables = os.environ if environment is None else environment
        numbers = []
        for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            text = variables.get(name, str(alone))
            if not text.isdecimal():
                raise UserError(
                    f"is {text!r}, not a number",
                    key=name,
                    remedy="start through `composer`",
                    file="environment",
                )
            numbers.append(int(text))
        topology = cls(*numbers)
        if not topology.rank < topology.world_size or not topology.local_rank < topology.local_world_size:
            raise UserError(
                f"{topology} is impossible", key="RANK", remedy="start through `composer`", file="environment"
            )
        return topology


def usable_cores() -> int:
    """Cores that this process may run on: those of its job or container, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
