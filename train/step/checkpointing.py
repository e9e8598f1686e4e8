"""When checkpoints are saved: by batches or minutes, at the end of the run, and on SIGTERM."""

import copy
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from composer.core import State

from train.checkpoint.files import Progress, restore_random_states
from train.checkpoint.saver import CheckpointSaver, Saved
from train.recipe.curriculum import Curriculum, to_json
from train.recipe.exit_status import PREEMPTED_STATUS
from train.recipe.schema import Checkpoint
from train.recipe.topology import Topology
from train.step.data_log import DataLog
from train.step.guard import UpdateGuard


class Checkpointing:
    """Saves the state after whole batches, while training goes on.

    All ranks agree on whether a save is due: rank 0's clock decides, and a SIGTERM to any rank counts for
    all. SIGTERM, by which schedulers announce that they will take the machine away, saves and ends the run
    with status 75 (EX_TEMPFAIL).

    Args:
        root: folder of the run's checkpoints.
        recipe: intervals and how many are kept.
        topology: this rank.
        resumed_from: checkpoint whose random-number states are restored before the first batch.
        curriculum: the run's stages and edits, which every checkpoint keeps.
        guard: whose memory is saved too.
        data_log: whose sums every checkpoint keeps; None: none is kept.
    """

    def __init__(
        self,
        root: Path,
        recipe: Checkpoint,
        topology: Topology,
        resumed_from: Path | None,
        curriculum: Curriculum,
        guard: UpdateGuard | None = None,
        data_log: DataLog | None = None,
    ) -> None:
        self.guard = guard
        self.recipe, self.topology, self.resumed_from = recipe, topology, resumed_from
        self.curriculum, self.data_log = curriculum, data_log
        self.saver = CheckpointSaver(root, topology, recipe.keep_last)
        # Of its own, since the saver's thread uses the saver's; gloo, so that nothing waits for a GPU.
        self._group = dist.new_group(backend="gloo") if topology.world_size > 1 else None
        self.last_save = time.monotonic()
        self.last_batch = -1
        self._is_terminated = False
        self._handler_before: signal.Handlers | None = None

    def listen(self) -> None:
        """Begins to listen for SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._terminate)  # type: ignore[assignment]

    def restore_random_states(self) -> None:
        """Restores the generators before the first batch, after everything that set-up drew from them."""
        if self.resumed_from is not None:
            restore_random_states(self.resumed_from, self.topology)
            self.resumed_from = None

    def save_if_due(self, state: State) -> None:
        """Saves when an interval has passed, or when the run was told to end.

        Raises:
            SystemExit: with status 75, once the state is saved after a SIGTERM.
        """
        self._tell(self.saver.poll())
        batch = state.timestamp.batch.value
        is_due_by_time, is_terminated = self._ask_all()
        every = self.recipe.interval_batches
        if is_terminated:
            self._save(state)
            self._tell(self.saver.wait())
            self._say(f"SIGTERM: ended after batch {batch}; the same command goes on")
            raise SystemExit(PREEMPTED_STATUS)
        if is_due_by_time or (every is not None and batch % every == 0):
            self._save(state)

    def save_end(self, state: State) -> None:
        """Saves the end of the run and waits for it."""
        if state.timestamp.batch.value != self.last_batch:
            self._save(state)
        self._tell(self.saver.wait())

    def close(self) -> None:
        """Waits for a save that is being written, and restores the handler of SIGTERM."""
        self.wait()
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)
            self._handler_before = None

    def wait(self) -> None:
        """Waits for a save that is being written; on all ranks."""
        self._tell(self.saver.wait())

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        self._is_terminated = True

    def _ask_all(self) -> tuple[bool, bool]:
        """Whether a save is due by time, and whether any rank was told to end."""
        minutes = self.recipe.interval_minutes
        is_due = minutes is not None and time.monotonic() - self.last_save >= 60 * minutes
        if self._group is None:
            return is_due, self._is_terminated
        flags = torch.tensor([is_due and self.topology.is_main, self._is_terminated], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return bool(flags[0]), bool(flags[1])

    def _save(self, state: State) -> None:
        stamp = state.timestamp
        progress = Progress(
            batch=stamp.batch.value,
            samples=stamp.sample.value,
            tokens=stamp.token.value,
            seconds=stamp.total_wct.total_seconds() if stamp.total_wct else 0.0,
            curriculum=to_json(self.curriculum),
            recent=self.guard.recent if self.guard is not None else [],
            counts=self.guard.counts if self.guard is not None else [0, 0],
            consumed=copy.deepcopy(self.data_log.totals) if self.data_log else {},
        )
        self.last_save, self.last_batch = time.monotonic(), progress.batch
        self._tell(self.saver.start(state.model, state.optimizers[0], progress))

    def _tell(self, saved: Saved | None) -> None:
        """Reports a save that failed; one that succeeded needs no words."""
        if saved is not None and saved.error:
            self._say(f"checkpoint of batch {saved.batch} NOT saved: {saved.error}; training goes on")

    def _say(self, line: str) -> None:
        if self.topology.is_main:
            print(line, file=sys.stderr, flush=True)
