"""Saves by batches or minutes and at the end; the run goes on where the disk refuses."""

import sys
import time
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from train.checkpoint import Progress, keep_newest, restore_random_states, save_checkpoint
from train.schema import Checkpoint
from train.topology import Topology


class Checkpointing(Callback):
    """Saves the state after whole batches.

    Args:
        root: folder of the run's checkpoints.
        recipe: intervals and how many are kept.
        resumed_from: checkpoint whose random-number states are restored before the first batch.
    """

    def __init__(self, root: Path, recipe: Checkpoint, topology: Topology, resumed_from: Path | None) -> None:
        self.root, self.recipe, self.topology = root, recipe, topology
        self.resumed_from = resumed_from
        self.last_save = time.monotonic()
        self.last_batch = -1

    def batch_start(self, state: State, logger: Logger) -> None:
        """Restores the generators after everything that set-up drew from them."""
        if self.resumed_from is not None:
            restore_random_states(self.resumed_from, self.topology)
            self.resumed_from = None

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Saves when an interval has passed."""
        if self._is_due(state.timestamp.batch.value):
            self._save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Saves the end of the run."""
        if state.timestamp.batch.value != self.last_batch:
            self._save(state)

    def _is_due(self, batch: int) -> bool:
        every, minutes = self.recipe.interval_batches, self.recipe.interval_minutes
        by_count = every is not None and batch % every == 0
        by_time = minutes is not None and time.monotonic() - self.last_save >= 60 * minutes
        return by_count or by_time

    def _save(self, state: State) -> None:
        stamp = state.timestamp
        progress = Progress(
            batch=stamp.batch.value,
            samples=stamp.sample.value,
            tokens=stamp.token.value,
            seconds=stamp.total_wct.total_seconds() if stamp.total_wct else 0.0,
        )
        self.last_save, self.last_batch = time.monotonic(), progress.batch
        try:
            save_checkpoint(self.root, state.model, state.optimizers[0], progress, self.topology)
        except OSError as error:
            print(f"checkpoint of batch {progress.batch} NOT saved: {error}; training goes on", file=sys.stderr)
            return
        if self.topology.is_main:
            keep_newest(self.root, self.recipe.keep_last)
