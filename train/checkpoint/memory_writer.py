"""Copies each rank's state to its host's memory and to another host's, while training continues.

Between two saves to the file system, as Gemini does (Wang et al., SOSP 2023, sections 4 and 5) and NVIDIA's
resiliency extension in its local checkpointing. A copy outlives the processes of its host; the neighbour's
outlives the host. What ranks find of them at a restart is read by :mod:`train.checkpoint.memory_reader`.

Only the copy from the device to this process's memory stalls training. A thread then writes a file of
``/dev/shm``, sends it to the next host and receives the previous one's. Files never change: each is written
under another name and renamed. All ranks keep the newest copy that all of them have finished, which they
agree on in the sum of each batch's loss (:meth:`MemoryWriter.flags`), until the next is finished.
"""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from train.checkpoint.files import CheckpointError, Progress, random_states
from train.checkpoint.groups import hyperparameters_of
from train.checkpoint.memory_files import (
    Head,
    describe,
    local_tensors,
    total_bytes,
    unpack,
    views,
)
from train.recipe.topology import Topology
from train.record.host_memory import copies_in, copy_name
from train.record.process import process_start

CHUNK_BYTES = 1 << 26
"""Sent and received at a time."""
SPARED = 0.05
"""Share of the host's shared memory that copies leave to others, such as NCCL and loaders."""
PARTIAL = re.compile(r"\.rank-.*\.(\d+)\.partial")


class MemoryWriter:
    """Makes the copies of a run; every rank has one and makes the same calls.

    Args:
        folder: of this host, see :func:`train.record.host_memory.memory_folder`.
        topology: this rank.
        layout: see :func:`train.checkpoint.memory_files.layout_digest`.
        made_by: identifies this start of the run; the same on every rank.
        hosts: every rank's host, by rank.
        last: the batch of the copy that the run resumes from; None: it resumes from none.
    """

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        layout: str,
        made_by: str,
        hosts: Sequence[str],
        last: int | None = None,
    ) -> None:
        self.folder, self.topology, self.layout, self.last = folder, topology, layout, last
        self.made_by = made_by
        self.error = ""
        """Why this rank makes no more copies; empty if it does."""
        rank, size = topology.rank, topology.world_size
        self.is_first_of_host = hosts.index(hosts[rank]) == rank
        shift = shift_of(hosts)
        self.to, self.source = (rank + shift) % size, (rank - shift) % size
        """The ranks that get this rank's state and whose state it gets; itself if there is one host."""
        self.group: dist.ProcessGroup | None = None
        if shift:
            # Ranks at the same place of their hosts; a group of their own, since training uses the others.
            column = sorted({(rank + turn * shift) % size for turn in range(size)})
            group = dist.new_group(column, backend="gloo", use_local_synchronization=True)
            self.group = group if isinstance(group, dist.ProcessGroup) else None
        self._staged: Tensor | None = None
        self._pending: int | None = None
        self._thread: threading.Thread | None = None

    def flags(self) -> list[bool]:
        """Returns what this rank tells the others with each batch's sums: not finished, and failed."""
        is_unfinished = self._thread is not None and self._thread.is_alive()
        return [is_unfinished, bool(self.error)]

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Copies the state and starts writing it; called once all ranks have finished the previous copy."""
        if self._thread is not None:
            self._thread.join()
            self.last = self._pending
        self._drop_older(progress.batch)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        del optimizer_state["param_groups"]  # A run keeps its own, which are the recipe's.
        tensors = list(local_tensors({"model": model_state, "optimizer": optimizer_state}))
        head = Head(
            self.topology.rank,
            self.layout,
            self.made_by,
            asdict(progress),
            random_states(),
            hyperparameters_of(model, optimizer.param_groups),
            describe(tensors),
            total_bytes(tensors),
        )
        staged = self._stage(tensors, head.size)
        self._pending = progress.batch
        self._thread = threading.Thread(
            target=self._write, args=(head, staged), name="memory copy", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Removes the copies, once the run needs them no more; every rank calls it."""
        if self._thread is not None:
            self._thread.join()
        self._thread, self._pending, self.last = None, None, None
        self._drop_older(None)
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):  # Another rank's copies are still there.
                folder.rmdir()

    def drop_after(self, batch: int) -> None:
        """Removes copies that were made after later batches; every rank calls it."""
        if self._thread is not None:
            self._thread.join()
        for (_, made), file in copies_in(self.folder).items():
            if made > batch:
                file.unlink(missing_ok=True)

    def _stage(self, tensors: list[tuple[str, Tensor]], size: int) -> Tensor:
        """Returns this process's copy of tensors, as bytes."""
        is_cuda = any(tensor.is_cuda for _, tensor in tensors)
        if self._staged is None or self._staged.numel() != size:
            # Zeros between the tensors; a GPU copies to pinned memory at full speed.
            self._staged = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        for tensor, place in views(self._staged, tensors):
            place.copy_(tensor, non_blocking=True)
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return self._staged

    def _drop_older(self, current: int | None) -> None:
        """Removes all copies but the newest that all ranks have, and what killed processes left.

        Args:
            current: the batch that ranks copy now, some of them already.
        """
        own = {self.topology.rank, self.source}
        for (rank, batch), file in copies_in(self.folder).items():
            if batch != self.last and (rank in own or (self.is_first_of_host and batch != current)):
                file.unlink(missing_ok=True)
        for file in self.folder.glob(".rank-*") if self.is_first_of_host else ():
            found = PARTIAL.fullmatch(file.name)
            if found and process_start(int(found[1])) is None:
                file.unlink(missing_ok=True)

    def _write(self, head: Head, staged: Tensor) -> None:
        """Writes the copy and exchanges it with the neighbours."""
        data = memoryview(staged.numpy())
        text = head.pack(hashlib.sha256(data).hexdigest())
        try:
            with self._file(head.rank, head.batch, len(text) + len(data)) as stream:
                stream.write(text)
                stream.write(data)
        except Exception as error:  # Any error ends the copies on all ranks, but not the training.
            self.error = _line(error)
        if self.group is None:
            return
        try:
            # Even if this rank could not write: the others wait for what it sends.
            self._exchange(text, staged, head.batch)
        except Exception as error:
            self.error = self.error or _line(error)

    def _exchange(self, text: bytes, staged: Tensor, batch: int) -> None:
        """Sends this rank's copy to one neighbour, and writes that of the other."""
        sizes = torch.zeros(2, dtype=torch.int64)
        self._swap(torch.tensor([len(text), staged.numel()]), sizes)
        their_head = torch.empty(int(sizes[0]), dtype=torch.uint8)
        self._swap(torch.frombuffer(bytearray(text), dtype=torch.uint8), their_head)
        length, buffer = int(sizes[1]), torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        their_text = bytes(their_head.numpy())
        chunks = range(0, max(length, staged.numel()), CHUNK_BYTES)

        def received() -> Iterator[memoryview]:
            for begin in chunks:
                chunk = buffer[: max(0, min(CHUNK_BYTES, length - begin))]
                self._swap(staged[begin : begin + CHUNK_BYTES], chunk)
                yield memoryview(chunk.numpy())

        parts, digest = received(), hashlib.sha256()
        name = f"the copy of rank {self.source}"
        try:
            with self._file(self.source, batch, len(their_text) + length) as stream:
                stream.write(their_text)
                for part in parts:
                    digest.update(part)
                    stream.write(part)
                if digest.hexdigest() != unpack(their_text, name)[0].sha256:
                    raise CheckpointError(f"{name} came damaged")
        finally:
            for _ in parts:  # A neighbour waits until it has sent all, whether or not there is room here.
                pass

    def _swap(self, mine: Tensor, theirs: Tensor) -> None:
        """Sends to one neighbour and receives from the other; what is empty is not sent."""
        works = []
        if mine.numel():
            works.append(dist.isend(mine, self.to, group=self.group))
        if theirs.numel():
            works.append(dist.irecv(theirs, self.source, group=self.group))
        for work in works:
            assert work is not None, "this rank is one of the group"
            work.wait()

    @contextmanager
    def _file(self, rank: int, batch: int, size: int) -> Iterator[BinaryIO]:
        """Opens a copy for writing; it has its name once it is whole.

        Raises:
            OSError: if there is no room for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        space = os.statvfs(self.folder)
        if space.f_bavail * space.f_frsize < size + SPARED * space.f_blocks * space.f_frsize:
            raise OSError(errno.ENOSPC, f"no room for {size / 2**30:.2f} GiB more", str(self.folder))
        name = copy_name(rank, batch)
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        try:
            with partial.open("wb") as stream:
                yield stream
            partial.replace(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)


def shift_of(hosts: Sequence[str]) -> int:
    """Returns the least number of ranks from each rank to one of another host; 0 if there is one host."""
    size = len(hosts)
    shifts = range(1, size)
    return next((shift for shift in shifts if all(hosts[r] != hosts[r - shift] for r in range(size))), 0)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
