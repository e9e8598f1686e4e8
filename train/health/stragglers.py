"""Callbacks of a watched run: progress reports for the watchdog, and detection of slow ranks."""

import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger

from train.health.collectives import CollectiveRecorder
from train.health.watchdog import Watchdog
from train.recipe.topology import Topology
from train.record import log, metrics
from train.record.step_log import StepLog

STRAGGLERS_FILE = "stragglers.jsonl"
LEAST_DEVIATIONS = 6.0
"""A slow rank is at least this many median absolute deviations from the median rank."""


class HeartbeatCallback(Callback):
    """Reports every phase of every step to the watchdog."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training begins."""
        self._move(state, "waiting for the first batch")

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The next batch is requested."""
        self._move(state, "waiting for a batch")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch has arrived."""
        self._move(state, "starting a batch")

    def before_forward(self, state: State, logger: Logger) -> None:
        """A forward pass begins."""
        self._move(state, "forward pass")

    def before_backward(self, state: State, logger: Logger) -> None:
        """A backward pass begins."""
        self._move(state, "backward pass")

    def after_backward(self, state: State, logger: Logger) -> None:
        """The backward pass is over; clipping and the update follow."""
        self._move(state, "update")

    def batch_end(self, state: State, logger: Logger) -> None:
        """A batch is over; checkpoints and evaluation may follow."""
        self.watchdog.has_trained()
        self._move(state, "records and checkpoint")

    def eval_start(self, state: State, logger: Logger) -> None:
        """Evaluation begins."""
        self._move(state, "evaluation")

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """An evaluation batch begins."""
        self._move(state, "evaluation")

    def fit_end(self, state: State, logger: Logger) -> None:
        """Training is over; the last checkpoint and evaluation follow."""
        self._move(state, "end of training")

    def close(self, state: State, logger: Logger) -> None:
        """Stops the watchdog."""
        self.watchdog.stop()

    def _move(self, state: State, where: str) -> None:
        self.watchdog.move(where, state.timestamp.batch.value)


class Stragglers(Callback):
    """Compares the ranks' own time per step every few batches; every rank has one.

    A rank's own time is its step time without waiting for others in collectives. Step times are equal on all
    ranks, since collectives synchronise them; the slow rank is the one that waits least. Medians over the
    interval ignore single slow steps. With NCCL the waiting happens on the GPU, so own times are unknown, and
    :mod:`train.health.watched` does not add this callback. A slow GPU shows in preflight.

    Args:
        folder: folder of the run's records; rank 0 writes ``stragglers.jsonl`` there.
        interval_batches: batches between comparisons.
        factor: a rank is named if its own time exceeds the median rank's by this factor.
        topology: this rank.
        recorder: recorder of this process's collectives.
    """

    def __init__(
        self,
        folder: Path,
        interval_batches: int,
        factor: float,
        topology: Topology,
        recorder: CollectiveRecorder,
    ) -> None:
        self.interval, self.factor = interval_batches, factor
        self.topology, self.recorder = topology, recorder
        self.log = StepLog(folder / STRAGGLERS_FILE) if topology.is_main else None
        self._begun = self._waited = 0.0
        self._own: list[float] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops records of batches that will be trained again."""
        if self.log is not None:
            self.log.drop_after(state.timestamp.batch.value)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A step begins."""
        self._begun, self._waited = time.perf_counter(), self.recorder.waited_seconds

    def batch_end(self, state: State, logger: Logger) -> None:
        """Ends a step, and compares the ranks at the end of the interval."""
        step = time.perf_counter() - self._begun
        self._own.append(step - (self.recorder.waited_seconds - self._waited))
        batch = state.timestamp.batch.value
        if batch % self.interval or not self._own:
            return
        mine = torch.tensor([statistics.median(self._own)], dtype=torch.float64)
        self._own = []
        gathered = [torch.empty_like(mine) for _ in range(self.topology.world_size)]
        # Over the job's own group: between batches nothing else speaks on it.
        dist.all_gather(gathered, mine)
        if self.log is None:
            return
        seconds = [one.item() for one in gathered]
        named = slow_ranks(seconds, self.factor)
        logger.log_metrics({metrics.SLOWEST_RANK: max(seconds) / statistics.median_low(seconds)})
        if named:
            median = statistics.median_low(seconds)
            self.log.write(batch, {"seconds": seconds, "slow": named})
            for rank in named:
                log.progress.warning(
                    f"batch {batch}: rank {rank} is slow: own time {seconds[rank]:.3f} s per step, "
                    f"median rank {median:.3f} s"
                )

    def close(self, state: State, logger: Logger) -> None:
        """Closes the file."""
        if self.log is not None:
            self.log.close()


def slow_ranks(seconds: list[float], factor: float) -> list[int]:
    """Ranks whose time exceeds the median rank's by ``factor`` and is beyond the ranks' spread.

    The spread is the median absolute deviation, which a few slow ranks do not widen. Of two ranks, the
    faster counts as the median.
    """
    median = statistics.median_low(seconds)
    spread = statistics.median_low([abs(one - median) for one in seconds])
    bound = max(factor * median, median + LEAST_DEVIATIONS * spread)
    return [rank for rank, one in enumerate(seconds) if one > bound]
