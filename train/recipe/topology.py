"""The rank of this process and the world size, from the launcher's variables; the cores it may use."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from train.recipe.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Rank and world size; `composer`, torchrun and SLURM's srun all set the same variables."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the rank that writes the run's files."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Topology":
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a single process if they are unset.

        Raises:
            UserError: if a variable is not a number or the rank is not below the world size.
        """
        variables = os.environ if environment is None else environment
        numbers = []
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            text = variables.get(name, str(default))
            if not text.isdecimal():
                raise UserError(
                    f"is {text!r}, not a number",
                    key=name,
                    remedy="start with `composer`",
                    file="environment",
                )
            numbers.append(int(text))
        topology = cls(*numbers)
        if not topology.rank < topology.world_size or not topology.local_rank < topology.local_world_size:
            raise UserError(
                f"{topology} is impossible", key="RANK", remedy="start with `composer`", file="environment"
            )
        return topology


def usable_cores() -> int:
    """Returns the number of cores of this job or container, if the system reports it; else of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
