"""Writes checkpoints while training continues; only the copy to host memory stalls it.

Of the ranks that hold the same shard in each replica, one writes it (:func:`writing_ranks`). It copies its
state to host memory; a thread then writes and hashes its files and agrees with the other writers over a gloo
group of their own. If any of them fails, for example because its disk is full, the save ends on all, its
files are removed, and training continues. The others hand their random-number states to the rank that writes
their shard, and continue training.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from train.checkpoint.files import (
    MANIFEST_FILE,
    PARTIAL,
    PROGRESS_FILE,
    STATE_FOLDER,
    CheckpointError,
    CheckpointManifest,
    Progress,
    check_checkpoint,
    keep_newest,
    random_states,
    writing_ranks,
)
from train.checkpoint.planning import SavePlanner
from train.recipe.topology import Topology
from train.record.files import sha256, write_whole

Result = TypeVar("Result")


@dataclass(frozen=True)
class Saved:
    """The outcome of a save."""

    batch: int
    folder: Path | None
    """The checkpoint; None if the save failed."""
    error: str
    """Why it failed, in one line; empty if it did not."""
    copy_seconds: float
    """Seconds that training was stalled."""
    seconds: float
    """Duration of the whole save, copy included."""


class CheckpointSaver:
    """Saves the state of a run below ``root``; every rank has one and makes the same calls.

    Host memory for one copy of the rank's shards is kept for the whole run.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks share.
        topology: this rank.
        keep_last: how many checkpoints to keep.
        replicas: the ranks that hold the same shards as this one, see
            :func:`train.layout.mesh.replicas_of`; None: no other does.
        stages: the ranks of this one's pipeline, each of which has other weights; None: all have the same.
    """

    def __init__(
        self,
        root: Path,
        topology: Topology,
        keep_last: int,
        replicas: dist.ProcessGroup | None = None,
        stages: dist.ProcessGroup | None = None,
    ) -> None:
        self.root, self.topology, self.keep_last, self.replicas = root, topology, keep_last, replicas
        self.stages = stages
        self.writers = writing_ranks(topology.world_size, replicas.size() if replicas is not None else 1)
        self.is_writer = topology.rank in self.writers
        self.group: dist.ProcessGroup | None = None
        if topology.world_size > 1:
            # A group of their own, since training uses the others meanwhile; gloo, as nothing is on a GPU.
            # Every rank calls it, as torch numbers groups; the others get no group.
            group = dist.new_group(self.writers, backend="gloo")
            self.group = group if isinstance(group, dist.ProcessGroup) and self.is_writer else None
        self._planner = SavePlanner(has_own_names=stages is not None)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Saved | None:
        """Copies the state and starts writing it; returns the outcome of the previous save, if any.

        Waits first if the previous save is still being written. A rank that writes nothing has no outcome.
        """
        before = self.wait()
        begun = time.perf_counter()
        names = ("model", "optimizer")
        # On every rank: it fills in the state of an optimizer that has not stepped yet.
        held: dict[str, dict[str, Any]] = dict(zip(names, get_state_dict(model, optimizer), strict=True))
        self._gather_groups(held["optimizer"])
        randoms = self._gather_randoms()
        if not self.is_writer:
            return before
        state = self._copy(held, "")
        copy_seconds = time.perf_counter() - begun

        def write() -> None:
            folder, error = None, ""
            try:
                folder = self._write(state, randoms, progress)
            except (CheckpointError, RuntimeError) as failure:  # gloo raises the latter if a rank is gone
                error = str(failure)
            seconds = time.perf_counter() - begun
            self._saved = Saved(progress.batch, folder, error, copy_seconds, seconds)

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        return before

    def poll(self) -> Saved | None:
        """Returns the outcome of a save that has finished since the last call, if any; never waits."""
        return None if self._thread is None or self._thread.is_alive() else self.wait()

    def wait(self) -> Saved | None:
        """Waits for a save that is still being written, and returns its outcome once."""
        if self._thread is not None:
            self._thread.join()
            assert self._saved is not None, "the writing thread failed"
        saved, self._saved, self._thread = self._saved, None, None
        return saved

    def _gather_randoms(self) -> dict[int, str]:
        """The random-number states of this rank and of those that hold the same shards, by rank."""
        mine = json.dumps(random_states())
        if self.replicas is None:
            return {self.topology.rank: mine}
        ranks = dist.get_process_group_ranks(self.replicas)
        gathered: list[Any] = [None] * len(ranks)
        dist.all_gather_object(gathered, mine, group=self.replicas)
        return dict(zip(ranks, gathered, strict=True))

    def _gather_groups(self, optimizer: dict[str, Any]) -> None:
        """Puts the groups of all stages' optimizers in place of a stage's own: they are saved by number."""
        if self.stages is None:
            return
        gathered: list[Any] = [None] * self.stages.size()
        dist.all_gather_object(gathered, optimizer["param_groups"], group=self.stages)
        optimizer["param_groups"] = [group for of_stage in gathered for group in of_stage]

    def _copy(self, value: Any, path: str) -> Any:
        """Returns the same tree with its tensors copied to host memory."""
        if isinstance(value, dict):
            return {key: self._copy(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, f"{path}/{place}") for place, item in enumerate(value)]
        if isinstance(value, DTensor):
            return DTensor(self._copy(value.to_local(), path), value._spec, requires_grad=False)
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        copy = self._copies.get(path)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            # A GPU copies to pinned memory at full speed.
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[path] = copy
        copy.copy_(value)
        return copy

    def _write(self, state: dict[str, Any], randoms: dict[int, str], progress: Progress) -> Path:
        """Writes and hashes the files and agrees with the other writers; each of them calls it.

        Raises:
            CheckpointError: on every writer, if the save failed on any.
        """
        final = self.root / f"batch-{progress.batch:08d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            self._agree(lambda: self._make_folder(partial))
            entries = self._agree(lambda: self._write_shards(partial, state, randoms, progress))
            self._agree(lambda: self._finish(partial, final, entries))
        except CheckpointError:
            if self.topology.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def _make_folder(self, partial: Path) -> None:
        if self.topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _write_shards(
        self, partial: Path, state: dict[str, Any], randoms: dict[int, str], progress: Progress
    ) -> dict[str, dict[str, int | str]]:
        """Writes this rank's files and returns their sizes and checksums, read back from the files."""
        place, no_dist = self.writers.index(self.topology.rank), self.group is None
        dcp.save(
            state,
            checkpoint_id=partial / STATE_FOLDER,
            planner=self._planner,
            process_group=self.group,
            no_dist=no_dist,
        )
        files = sorted((partial / STATE_FOLDER).glob(f"__{place}_*"))
        for rank, states in randoms.items():
            files.append(partial / f"rank-{rank}.json")
            write_whole(files[-1], states)
        if self.topology.is_main:
            files += [partial / STATE_FOLDER / ".metadata", partial / PROGRESS_FILE]
            write_whole(files[-1], json.dumps(asdict(progress)))
        return {
            str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in files
        }

    def _finish(self, partial: Path, final: Path, entries: list[dict[str, Any]]) -> None:
        """Writes the manifest, renames the folder and removes old checkpoints."""
        if not self.topology.is_main:
            return
        files = {name: entry for part in entries for name, entry in part.items()}
        manifest = CheckpointManifest(self.topology.world_size, files)
        write_whole(partial / MANIFEST_FILE, manifest.to_json())
        if final.exists() and not _is_whole(final):
            shutil.rmtree(final)
        if not final.exists():
            partial.rename(final)
        keep_newest(self.root, self.keep_last)

    def _agree(self, work: Callable[[], Result]) -> list[Result]:
        """Runs one part of the save on every writer, and returns all their results.

        Raises:
            CheckpointError: on every writer, if the part failed on any.
        """
        result, error = None, ""
        try:
            result = work()
        except CheckpointException as failure:  # not an Exception; holds each rank's own
            causes = {self.writers[place]: cause[0] for place, cause in failure.failures.items()}
            error = "; ".join(f"rank {rank}: {_line(cause)}" for rank, cause in causes.items())
        except Exception as failure:  # Any error ends the save on all writers, but not the training.
            error = f"rank {self.topology.rank}: {_line(failure)}"
        outcomes: list[Any] = [(result, error)]
        if self.group is not None:
            outcomes = [None] * len(self.writers)
            dist.all_gather_object(outcomes, (result, error), group=self.group)
        errors = [error for _, error in outcomes if error]
        if errors:
            raise CheckpointError(errors[0])
        return [result for result, _ in outcomes]


def _is_whole(folder: Path) -> bool:
    try:
        check_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
