"""Goodput: the share of a run's time that moves it forward, with saves, interruptions and steps run again.

A failure costs the start of the job and, on average, half the time between two saves or copies in the hosts'
memory; more if both hosts of a copy are gone, which is not counted. Rates of failure add up over GPUs (Young
1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006).
"""

import math
from dataclasses import dataclass

from launch.plan.step import Plan

PUBLISHED_FAILURES = 419 / (54 * 24 * 16_384)
"""Unexpected interruptions per GPU-hour: 419 in 54 days on 16,384 H100s (Llama 3, 2024, arXiv 2407.21783,
section 3.3.4)."""
RESTART_MINUTES = 5.0
"""From a failure to the first new step; assumed, not measured at this size."""
HOST_COPY = 25e9
"""Bytes per second of a copy to pinned host memory over PCIe 5, half of what it can; assumed."""


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run goes."""

    failures_per_hour: float
    restart_seconds: float
    save_seconds: float
    """Time that training stops for a save: the copy to host memory; threads write."""
    interval_seconds: float
    """Time between two saves."""
    recheck_share: float
    """Further forward and backward passes, as a share of the arithmetic of all steps."""
    copy_interval_seconds: float | None = None
    """Time between two copies to the hosts' memory, each of which stops training as a save does; None:
    there are none."""

    @property
    def share(self) -> float:
        """Goodput, in [0, 1]; 0 if interruptions come faster than the run gets over them."""
        return max(0.0, 1 - self.lost_share) / (1 + self.save_share + self.recheck_share)

    @property
    def _intervals(self) -> list[float]:
        return [self.interval_seconds, *filter(None, [self.copy_interval_seconds])]

    @property
    def save_share(self) -> float:
        """Time of saves and copies over that of steps."""
        return sum(self.save_seconds / each for each in self._intervals)

    @property
    def restart_share(self) -> float:
        """Time of restarts over all time."""
        return self.failures_per_hour * self.restart_seconds / 3600

    @property
    def rework_share(self) -> float:
        """Time of work that is done again over all time."""
        return self.failures_per_hour * min(self._intervals) / 2 / 3600

    @property
    def lost_share(self) -> float:
        """Time that interruptions take over all time."""
        return self.restart_share + self.rework_share

    @property
    def best_interval_seconds(self) -> float:
        """Time between two saves that loses least: the root of twice a save's time over the rate (Young)."""
        if not self.failures_per_hour:
            return math.inf
        return math.sqrt(2 * self.save_seconds * 3600 / self.failures_per_hour)


def goodput(
    plan: Plan,
    failures_per_gpu_hour: float = PUBLISHED_FAILURES,
    restart_minutes: float = RESTART_MINUTES,
) -> Goodput:
    """Returns the goodput of a planned run with its recipe's saves and rechecks.

    Args:
        plan: of the run; steps are those of its first shape.
        failures_per_gpu_hour: interruptions that nobody has planned.
        restart_minutes: from a failure to the first new step.
    """
    recipe, memory = plan.recipe, plan.memory
    run_seconds, saves = plan.days * 86_400, recipe.checkpoint
    copies = saves.memory_interval_batches
    intervals = [run_seconds]
    if saves.interval_batches is not None:
        intervals.append(saves.interval_batches * plan.step_seconds)
    if saves.interval_minutes is not None:
        intervals.append(saves.interval_minutes * 60)
    every = recipe.guard.recheck_interval_batches
    again = 1 if recipe.parallelism.expert == plan.world_size else 2
    return Goodput(
        failures_per_hour=failures_per_gpu_hour * plan.world_size,
        restart_seconds=60 * restart_minutes,
        save_seconds=(memory.weights + memory.optimizer) / HOST_COPY,
        interval_seconds=min(intervals),
        recheck_share=0.0 if every is None else again / every,
        copy_interval_seconds=copies * plan.step_seconds if copies is not None else None,
    )
