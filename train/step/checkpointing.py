"""Checkpoint policy: save every so many batches or minutes, at the run's end, on SIGTERM or Ctrl-C, and where
the layout changes.
"""

import copy
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist
from composer.core import State

from train.checkpoint.files import Progress, set_aside
from train.checkpoint.memory_writer import MemoryWriter
from train.checkpoint.saver import CheckpointSaver, Saved
from train.layout.ranks import run_on_rank_0
from train.recipe.curriculum import Curriculum, to_json
from train.recipe.exit_status import PREEMPTED_STATUS
from train.recipe.schema import Checkpoint
from train.recipe.topology import Topology
from train.record import log
from train.record.run_folder import batches_of, note_saved
from train.step.data_log import DataLog
from train.step.guard import UpdateGuard

logger = log.get_logger(__name__)


class NotSavedError(RuntimeError):
    """A state that could not be saved where the run has to end."""


class Checkpointing:
    """Saves the state between batches, while training continues.

    All ranks agree on whether a save is due: rank 0's clock decides, and a SIGTERM to any rank counts for
    all. They do so in the sum of the batch's loss (:meth:`flags`), which every batch has anyway. SIGTERM, by
    which schedulers announce preemption, saves after the batch and ends the run with status 75 (EX_TEMPFAIL);
    one that comes after the batch's sum, during the update or the records, does so after the next batch.
    SIGINT, which Ctrl-C sends, does the same; a second one ends the process at once. So does a phase that has
    another layout: the run that resumes builds it.

    Args:
        root: folder of the run's checkpoints.
        recipe: intervals, and how many checkpoints to keep.
        topology: this rank.
        restore: restores the random-number states before the first batch; None: nothing is resumed.
        curriculum: the run's stages and edits, saved in every checkpoint.
        guard: its history is saved in every checkpoint.
        data_log: its sums are saved in every checkpoint; None: no data log.
        replicas: ranks that hold the same shards as this one, see :class:`CheckpointSaver`.
        memory: makes copies in the hosts' memory; None: there are none.
        stages: ranks of this one's pipeline, see there.
        next_layout: says how the layout changes after so many batches; empty: it does not.
    """

    def __init__(
        self,
        root: Path,
        recipe: Checkpoint,
        topology: Topology,
        restore: Callable[[], object] | None,
        curriculum: Curriculum,
        guard: UpdateGuard | None = None,
        data_log: DataLog | None = None,
        replicas: dist.ProcessGroup | None = None,
        memory: MemoryWriter | None = None,
        stages: dist.ProcessGroup | None = None,
        next_layout: Callable[[int], str] = lambda _: "",
    ) -> None:
        self._next_layout = next_layout
        self.guard, self.memory = guard, memory
        self.recipe, self.topology, self._restore = recipe, topology, restore
        self.curriculum, self.data_log = curriculum, data_log
        self.saver = CheckpointSaver(root, topology, recipe.keep_last, replicas, stages)
        self.last_save = time.monotonic()
        self.last_batch = -1
        self._is_saved = False
        """On rank 0: whether the last save that ended succeeded."""
        self._is_copy_due = False
        self._told_by = ""
        """The signal that told this rank to save and end; empty if none has."""
        self._handlers_before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Starts listening for SIGTERM and SIGINT."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers_before[number] = signal.signal(number, self._terminate)

    def restore_random_states(self) -> None:
        """Restores the random-number states before the first batch, after set-up has drawn from them."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def flags(self) -> list[bool]:
        """Returns what this rank tells the others with each batch's sums, see :meth:`save_if_due`."""
        minutes = self.recipe.interval_minutes
        is_due = minutes is not None and time.monotonic() - self.last_save >= 60 * minutes
        own = [is_due and self.topology.is_main, bool(self._told_by)]
        return own + (self.memory.flags() if self.memory is not None else [])

    def save_if_due(
        self,
        state: State,
        is_due_by_time: bool,
        is_terminated: bool,
        is_copying: bool = False,
        has_copy_failed: bool = False,
    ) -> None:
        """Saves if an interval has passed, a SIGTERM or Ctrl-C has arrived, or the layout changes.

        Copies to memory likewise.

        Args:
            state: the state after the batch.
            is_due_by_time: whether any rank's first flag was raised (:meth:`flags`).
            is_terminated: whether any rank's second was.
            is_copying: whether any rank's third was: a copy to memory that is due waits for the next batch.
            has_copy_failed: whether any rank's fourth was: no more are made.

        Raises:
            SystemExit: with status 75, once the state is saved after a signal or at a change of the layout.
            NotSavedError: if it could not be saved there: the run would end there again and again.
        """
        self._report(self.saver.poll())
        batch = state.timestamp.batch.value
        every = self.recipe.interval_batches
        if is_terminated:
            self._save(state)
            self._end()
            told_by = self._told_by or "SIGTERM"
            self._log(f"{told_by}: saved and ended after batch {batch}; the same command resumes the run")
            raise SystemExit(PREEMPTED_STATUS)
        if change := self._next_layout(batch):
            self._end_layout(state, change)
        if is_due_by_time or (every is not None and batch % every == 0):
            self._save(state)
        if has_copy_failed:
            self._stop_copying()
        self._copy_if_due(state, is_copying)

    def _end_layout(self, state: State, change: str) -> NoReturn:
        """Saves and ends, since the next batch has another layout."""
        self._save(state)
        batch = state.timestamp.batch.value
        if not self._end():
            raise NotSavedError(f"{change}, but the checkpoint of batch {batch} could not be saved")
        self._log(
            f"saved and ended after batch {batch} with status {PREEMPTED_STATUS}: {change}; the same command "
            "continues the run, as a supervisor does by itself"
        )
        raise SystemExit(PREEMPTED_STATUS)

    def save_end(self, state: State) -> None:
        """Saves the final checkpoint and waits until it is written."""
        if state.timestamp.batch.value != self.last_batch:
            self._save(state)
        self._end()
        self._stop_listening(signal.SIGINT)  # Nothing is left to save.

    def set_aside_after(self, batch: int) -> None:
        """Sets checkpoints of later batches aside; every rank calls it.

        If none is left, the run begins again, unless older ones are no longer kept.
        """
        self.wait()
        if self.memory is not None:
            self.memory.drop_after(batch)
        run_on_rank_0(self.topology, lambda: self._set_aside_after(batch))

    def close(self) -> None:
        """Waits for this rank's part of a save that is being written, and restores the signals' handlers."""
        self._report(self.saver.wait())
        self._stop_listening(signal.SIGTERM, signal.SIGINT)

    def wait(self) -> None:
        """Waits for a save that is still being written; every rank calls it, those that write nothing too."""
        run_on_rank_0(self.topology, lambda: self._report(self.saver.wait()))
        self.saver.wait()

    def _end(self) -> bool:
        """Waits for the last save; if it succeeded, which it returns, copies in memory are needed no more."""
        self.wait()
        is_saved = run_on_rank_0(self.topology, lambda: self._is_saved)
        if self.memory is not None and is_saved:
            self.memory.finish()
        return is_saved

    def _copy_if_due(self, state: State, is_copying: bool) -> None:
        """Copies to memory if that is due, once all ranks have finished the previous copy."""
        every, batch = self.recipe.memory_interval_batches, state.timestamp.batch.value
        if self.memory is None or every is None:
            return
        self._is_copy_due = self._is_copy_due or batch % every == 0
        if self._is_copy_due and not is_copying:
            self._is_copy_due = False
            self.memory.start(state.model, state.optimizers[0], self._progress(state))

    def _stop_copying(self) -> None:
        """Makes no more copies to memory in this try, since a rank can't, and frees the memory."""
        assert self.memory is not None
        if self.memory.error:
            line = f"NO more copies in memory: rank {self.topology.rank}: {self.memory.error}"
            logger.warning(f"{line}; training continues", extra=log.ALL_RANKS)
        self.memory.finish()
        self.memory = None

    def _terminate(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            # After Ctrl-C, Composer's launcher also sends it to every rank.
            self._told_by = self._told_by or "SIGTERM"
            return
        self._told_by = "Ctrl-C"
        # The system's own handler ends a process that waits for others too, where Python's has no turn.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._log("Ctrl-C: saves and ends after this batch; once more ends at once, without saving")

    def _stop_listening(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._handlers_before:
                signal.signal(number, self._handlers_before.pop(number))

    def _progress(self, state: State) -> Progress:
        stamp = state.timestamp
        return Progress(
            batch=stamp.batch.value,
            samples=stamp.sample.value,
            tokens=stamp.token.value,
            seconds=stamp.total_wct.total_seconds() if stamp.total_wct else 0.0,
            curriculum=to_json(self.curriculum),
            recent=self.guard.recent if self.guard is not None else [],
            counts=self.guard.counts if self.guard is not None else [0, 0],
            consumed=copy.deepcopy(self.data_log.totals) if self.data_log else {},
        )

    def _save(self, state: State) -> None:
        progress = self._progress(state)
        self.last_save, self.last_batch = time.monotonic(), progress.batch
        self._report(self.saver.start(state.model, state.optimizers[0], progress))

    def _set_aside_after(self, batch: int) -> None:
        kept = batches_of(self.saver.root)
        later = [folder for number, folder in kept.items() if number > batch]
        if batch and later and len(later) == len(kept):
            self._log(f"no checkpoint is from before batch {batch + 1}, since when nothing was rechecked")
            return
        set_aside(later)
        if later:
            names = ", ".join(folder.name for folder in later)
            self._log(f"set aside, since nothing was rechecked from batch {batch} on: {names}")

    def _report(self, saved: Saved | None) -> None:
        """Reports a save that failed, and notes one that did not."""
        if saved is not None:
            self._is_saved = saved.folder is not None
        if saved is not None and saved.folder is not None and self.topology.is_main:
            with suppress(OSError):
                note_saved(self.saver.root.parent, saved.batch)
        if saved is not None and saved.error:
            self._log(f"checkpoint of batch {saved.batch} NOT saved: {saved.error}; training continues")

    def _log(self, line: str) -> None:
        if self.topology.is_main:
            logger.warning(line)
