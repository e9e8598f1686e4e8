"""A profile of a few batches: torch's trace of host and device, and a GPU's memory over time."""

from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from train.record.log import ALL_RANKS, get_logger

logger = get_logger(__name__)

PROFILE_FOLDER = "profile"
MOST_ALLOCATIONS = 200_000
"""Allocations and releases that a memory snapshot holds, the newest."""


class Profiling(Callback):
    """Records a trace of a range of batches, for the ranks that have one.

    ``profile/rank-R.trace.json.gz`` in the run's folder opens in Perfetto or Chrome's tracing,
    ``rank-R.memory.pickle`` (of a GPU) on PyTorch's page of memory snapshots. The first batch of the range is
    slower, since the profiler starts in it.

    Args:
        folder: folder of the run.
        rank: this rank.
        first: first batch of the range, from 1.
        last: its last.
        on_gpu: also record kernels and memory (not yet run on a GPU).
    """

    def __init__(self, folder: Path, rank: int, first: int, last: int, *, on_gpu: bool) -> None:
        self.folder, self.rank, self.on_gpu = folder / PROFILE_FOLDER, rank, on_gpu
        self.first, self.last = first, last
        self._profiler: Any = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Starts the profiler at the range's first batch, or at the first of a run resumed inside it."""
        batch = state.timestamp.batch.value + 1
        if self._profiler is not None or not self.first <= batch <= self.last:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Ends the profile after the range's last batch; the clock has already advanced past it."""
        if state.timestamp.batch.value >= self.last:
            self._end()

    def close(self, state: State, logger: Logger) -> None:
        """Ends the profile of a run that ended inside the range."""
        self._end()

    def _end(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self.folder.mkdir(exist_ok=True)
            trace = self.folder / f"rank-{self.rank}.trace.json.gz"
            profiler.export_chrome_trace(str(trace))
            if self.on_gpu:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"rank-{self.rank}.memory.pickle"))
            logger.info(f"profile of rank {self.rank}: {trace}", extra=ALL_RANKS)
        except (OSError, RuntimeError) as error:
            logger.warning(
                f"{self.folder}: profile NOT written: {error}; training continues", extra=ALL_RANKS
            )
        finally:
            if self.on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
