"""Checkpoints: sharded files, validated by a manifest that is written last.

A checkpoint is a folder ``batch-00000100`` of torch.distributed.checkpoint files (model and optimizer,
of each shard one copy), one ``rank-N.json`` of random-number states per rank and ``progress.json``. It is
written (:mod:`train.checkpoint.saver`) under a name that ends in ``.partial``; the manifest with every
file's size and SHA-256 is written last, and then the folder is renamed. So an interrupted save is never
mistaken for a checkpoint, and a missing, truncated or altered file is found before anything is loaded.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from train.recipe.errors import UserError
from train.recipe.topology import Topology, usable_cores
from train.record.files import sha256
from train.record.run_folder import batches_of

Agreed = TypeVar("Agreed")

MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
STATE_FOLDER = "state"
PARTIAL = ".partial"
ASIDE = "rolled-back-"
"""Name prefix of checkpoints that were trained on data that is excluded now."""
MOST_THREADS = 8
"""Maximum number of files that a rank reads at a time."""
ONE_RANK = Topology()


class CheckpointError(RuntimeError):
    """A checkpoint is invalid; the message is one line. Callers fall back to an older one."""


@dataclass(frozen=True)
class Progress:
    """A run's progress."""

    batch: int
    samples: int
    tokens: int
    seconds: float
    curriculum: dict[str, Any] | None = None
    """The run's stages and their edits so far, see :func:`train.recipe.curriculum.to_json`."""
    recent: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, with which the guard compares the next one."""
    counts: list[int] = field(default_factory=lambda: [0, 0])
    """The guard's counts, see :attr:`train.step.guard.UpdateGuard.counts`."""
    consumed: dict[str, dict[str, int]] = field(default_factory=dict)
    """Samples and tokens of each domain so far, see :class:`train.step.data_log.DataLog`."""


@dataclass(frozen=True)
class CheckpointManifest:
    """A checkpoint's files."""

    world_size: int
    files: dict[str, dict[str, Any]]
    """By path below the checkpoint's folder: ``bytes`` and ``sha256``."""

    def to_json(self) -> str:
        """Returns the text of the file; it has its own digest, as nothing else covers it."""
        tree = asdict(self)
        return json.dumps(tree | {"digest": _digest(tree)}, indent=1)


def read_progress(folder: Path) -> Progress:
    """Reads a run's progress at a checkpoint.

    Raises:
        UserError: if it can't be read.
    """
    file = folder / PROGRESS_FILE
    try:
        return Progress(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        what = f"{file} can't be read ({type(error).__name__})"
        raise UserError(what, remedy="another version may have written it: use that one") from None


def restore_random_states(folder: Path, topology: Topology) -> bool:
    """Restores this rank's random-number states; False if the checkpoint has another number of ranks."""
    if read_manifest(folder).world_size != topology.world_size:
        return False
    set_random_states(json.loads((folder / f"rank-{topology.rank}.json").read_text()))
    return True


def set_random_states(states: dict[str, Any]) -> None:
    """Sets this process's random-number generators to what :func:`random_states` has returned."""
    random.setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def newest_whole_checkpoint(
    root: Path,
    topology: Topology = ONE_RANK,
    refuse: Callable[[Path], str] = lambda _: "",
    batch: int | None = None,
) -> tuple[Path | None, list[str]]:
    """Returns the newest valid checkpoint, and one line for each newer one that is not.

    With several ranks, all of them call it and each reads its part of the files.

    Args:
        root: folder of the checkpoints.
        topology: this rank.
        refuse: returns why a valid checkpoint can't be used, or an empty string; identical on all ranks.
        batch: only the checkpoint of this batch; None: any.
    """
    complaints: list[str] = []
    paths = [str(path) for at, path in batches_of(root).items() if batch in (None, at)]
    for folder in agree(paths, topology)[0]:
        complaint = ""
        try:
            check_checkpoint(Path(folder), topology=topology)
        except CheckpointError as error:
            complaint = str(error)
        found = next(filter(None, agree(complaint, topology)), "") or refuse(Path(folder))
        if not found:
            used = "; an older checkpoint is used instead"
            return Path(folder), [f"{newer}{used}" for newer in complaints]
        complaints.append(found)
    return None, complaints


def read_manifest(folder: Path) -> CheckpointManifest:
    """Reads a checkpoint's manifest.

    Raises:
        CheckpointError: if there is none, or any of it is not as it was written.
    """
    path = folder / MANIFEST_FILE
    try:
        tree = json.loads(path.read_bytes())
        digest = tree.pop("digest", None)
        manifest = CheckpointManifest(**tree)
        names, world_size = manifest.files.keys(), manifest.world_size
        # A manifest without a digest is from a former version.
        is_sound = (
            (digest == _digest(tree) if digest is not None else True)
            and isinstance(world_size, int)
            and 0 < world_size <= len(names)
            and {f"rank-{rank}.json" for rank in range(world_size)} | {PROGRESS_FILE} <= names
            and f"rank-{world_size}.json" not in names
            and all(_is_below(name) for name in names)
            and all(
                entry.keys() == {"bytes", "sha256"}
                and isinstance(entry["bytes"], int)
                and isinstance(entry["sha256"], str)
                for entry in manifest.files.values()
            )
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: has no readable {MANIFEST_FILE} ({type(error).__name__})") from None
    if not is_sound:
        raise CheckpointError(f"{path}: is not as it was written")
    return manifest


def check_checkpoint(folder: Path, *, content: bool = True, topology: Topology = ONE_RANK) -> None:
    """Compares every file of a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        content: compare checksums too, which reads every byte.
        topology: this rank; each file is read by one rank, under the layout that saved it by the one that
            will load it: then its node has it in memory already, and storage is read once.

    Raises:
        CheckpointError: for the first file that is missing, truncated or altered.
    """
    files = {folder / name: entry for name, entry in sorted(read_manifest(folder).files.items())}
    for file, entry in files.items():
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes instead of {entry['bytes']}")
    ranks = _loading_ranks([file.name for file in files], topology.world_size)
    mine = [file for file, rank in zip(files, ranks, strict=True) if rank == topology.rank]
    if not content or not mine:
        return
    # Hashing on one core is slower than reading from disk; hashlib releases the GIL.
    with ThreadPoolExecutor(min(MOST_THREADS, usable_cores())) as pool:
        for file, found in zip(mine, pool.map(sha256, mine), strict=True):
            if found != files[file]["sha256"]:
                raise CheckpointError(f"{file}: its content is not what was written (SHA-256 differs)")


def keep_newest(root: Path, count: int) -> None:
    """Removes all but the newest ``count`` checkpoints, leftovers of interrupted saves, and rolled-back
    checkpoints that are no longer needed.

    A checkpoint with a missing or truncated file does not count, so the only valid checkpoint is never
    removed. Call it after a save, whose checksums have just been computed from its files.
    """
    for leftover in root.glob(f"batch-*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    kept = 0
    whole = [file for path in batches_of(root).values() if (file := path / MANIFEST_FILE).is_file()]
    for aside in root.glob(f"{ASIDE}*"):
        # The run has come as far again without the data that this one was trained on.
        if whole and aside.name.removeprefix(ASIDE) <= whole[0].parent.name.removeprefix("batch-"):
            shutil.rmtree(aside, ignore_errors=True)
    for manifest in whole:
        if kept >= count:
            # Without its manifest it no longer counts, even if the removal is interrupted here.
            manifest.unlink()
            shutil.rmtree(manifest.parent)
            continue
        try:
            check_checkpoint(manifest.parent, content=False)
        except CheckpointError:
            continue
        kept += 1


def set_aside(folders: Sequence[Path]) -> None:
    """Renames checkpoints that a rollback discards, so that they are no longer found.

    They are removed once the run has a checkpoint as far along (:func:`keep_newest`).
    """
    for folder in folders:
        aside = folder.with_name(ASIDE + folder.name.removeprefix("batch-"))
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def writing_ranks(world_size: int, replicas: int) -> list[int]:
    """The ranks that write and read a checkpoint: of those that hold the same shard, one each.

    They are of another replica for each shard, rank 0 among them. A replica's ranks are numbered one after
    the other, node by node: so many nodes share the work, and not only those of the first replica.
    """
    size = world_size // replicas
    return [place % replicas * size + place for place in range(size)]


def random_states() -> dict[str, Any]:
    """Returns the states of this process's random-number generators as JSON values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def agree(mine: Agreed, topology: Topology) -> list[Agreed]:
    """Gathers a value from every rank, by rank; every rank calls it."""
    if topology.world_size == 1:
        return [mine]
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, mine)
    return gathered


def _loading_ranks(names: Sequence[str], world_size: int) -> list[int]:
    """Returns for each file of a checkpoint the rank that loads it, if this run has the layout that saved it.

    Files of no particular rank, and those of ranks that this run lacks, go by turns.
    """
    shards = [re.fullmatch(r"__(\d+)_\d+\.distcp", name) for name in names]
    states = [re.fullmatch(r"rank-(\d+)\.json", name) for name in names]
    # Shards are numbered by their place among the ranks that wrote them.
    count = len({shard[1] for shard in shards if shard})
    writers = writing_ranks(world_size, world_size // count) if count and world_size % count == 0 else []
    found = []
    for number, (shard, state) in enumerate(zip(shards, states, strict=True)):
        rank = number
        if shard is not None and int(shard[1]) < len(writers):
            rank = writers[int(shard[1])]
        elif state is not None:
            rank = int(state[1])
        found.append(rank % world_size)
    return found


def _is_below(name: str) -> bool:
    """Returns True for the name of a file below a folder, however it is written."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
