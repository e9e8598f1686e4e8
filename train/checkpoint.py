"""Checkpoints: sharded files and, written last, a manifest without which they do not count.

A checkpoint is a folder ``batch-00000100`` of torch.distributed.checkpoint files (model and optimizer,
each rank its shards), one ``rank-N.json`` of random-number states per rank and ``progress.json``. It is
written under a name that ends in ``.partial``; the manifest with every file's size and SHA-256 comes
last and the rename after it. So a save that was cut off is never taken for a checkpoint, and a file
that is missing, cut short or altered is found before anything is loaded.
"""

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from train.topology import Topology

MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
PARTIAL = ".partial"
BLOCK_BYTES = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint that is not whole, said in one line."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    batch: int
    samples: int
    tokens: int
    seconds: float


def save_checkpoint(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    topology: Topology,
) -> Path:
    """Writes the checkpoint of ``progress`` below ``root`` and returns its folder; every rank calls it.

    Raises:
        OSError: if the disk refuses; what was written before stays whole.
    """
    final = root / f"batch-{progress.batch:08d}"
    if (final / MANIFEST_FILE).exists():
        return final
    partial = final.with_name(final.name + PARTIAL)
    if topology.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(topology)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    alone = topology.world_size == 1
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial / "state", no_dist=alone
    )
    (partial / f"rank-{topology.rank}.json").write_text(json.dumps(_random_states()))
    _barrier(topology)
    if topology.is_main:
        (partial / PROGRESS_FILE).write_text(json.dumps(progress.__dict__))
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        entries = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        manifest = {"world_size": topology.world_size, "files": entries}
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
        partial.rename(final)
    _barrier(topology)
    return final


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology
) -> Progress:
    """Loads model and optimizer in place, on this run's own layout, and returns the progress.

    Random-number states are restored by :func:`restore_random_states`, just before training goes on.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "state", no_dist=topology.world_size == 1)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return Progress(**json.loads((folder / PROGRESS_FILE).read_text()))


def restore_random_states(folder: Path, topology: Topology) -> bool:
    """Restores this rank's generators; False where the checkpoint is of another number of ranks."""
    world_size = json.loads((folder / MANIFEST_FILE).read_text())["world_size"]
    if world_size != topology.world_size:
        return False
    states = json.loads((folder / f"rank-{topology.rank}.json").read_text())
    random.setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    return True


def newest_whole_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not."""
    complaints = []
    for folder in sorted(root.glob("batch-*"), reverse=True):
        if folder.name.endswith(PARTIAL):
            continue
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            complaints.append(f"{error}; an older checkpoint is used instead")
            continue
        return folder, complaints
    return None, complaints


def check_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: for the first file that is missing, cut short or altered.
    """
    try:
        entries = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: has no readable {MANIFEST_FILE} ({type(error).__name__})") from None
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: its content is not what was written (SHA-256 differs)")


def keep_newest(root: Path, count: int) -> None:
    """Removes all but the newest ``count`` whole checkpoints, and leftovers of saves that were cut off."""
    for leftover in root.glob(f"batch-*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    whole = sorted(p.parent for p in root.glob(f"batch-*/{MANIFEST_FILE}"))
    for folder in whole[:-count]:
        # Without its manifest it no longer counts, even if the removal is cut off here.
        (folder / MANIFEST_FILE).unlink()
        shutil.rmtree(folder)


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _barrier(topology: Topology) -> None:
    if topology.world_size > 1:
        dist.barrier()
