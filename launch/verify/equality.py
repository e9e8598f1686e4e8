"""Bitwise comparison of two runs: losses, data log, model, optimizer and random-number states."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.verify.tiny_runs import record
from train.checkpoint.files import STATE_FOLDER, newest_whole_checkpoint
from train.checkpoint.reading import CheckpointReader
from train.record import metrics
from train.record.run_folder import CHECKPOINTS_FOLDER, DATA_LOG_FILE
from train.record.step_log import read_steps

COMPARED = (metrics.LOSS, metrics.LOSS_BALANCE, metrics.GRADIENT_NORM)


def differences(whole: Path, folder: Path) -> Iterator[str]:
    """Yields the first difference of an interrupted run from an uninterrupted one, in each part compared.

    Losses, gradient norms, the data log, and the newest checkpoint's model, optimizer and random-number
    states are compared bit for bit.
    """
    expected, found = record(whole), record(folder)
    if expected.keys() != found.keys():
        yield f"has steps {sorted(found)}"
        return
    for step, row in expected.items():
        for key in COMPARED:
            if row.get(key) != found[step].get(key):
                yield f"step {step}: {key} is {found[step].get(key)!r}, not {row.get(key)!r}"
                return
    for line, other in itertools.zip_longest(
        read_steps(whole / DATA_LOG_FILE), read_steps(folder / DATA_LOG_FILE)
    ):
        if line != other:
            yield f"the data log has {other}, not {line}"
            return
    states = []
    for each in (whole, folder):
        checkpoint, _ = newest_whole_checkpoint(each / CHECKPOINTS_FOLDER)
        assert checkpoint is not None
        randoms = [file.read_text() for file in sorted(checkpoint.glob("rank-*.json"))]
        states.append((read_state(checkpoint), randoms))
    yield from unequal(states[0][0], states[1][0])
    if states[0][1] != states[1][1]:
        yield "random-number states differ"


def unequal(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Iterator[str]:
    """Yields the first tensor that is missing, new or not equal bit for bit, if there is one."""
    if expected.keys() != found.keys():
        yield f"tensors are missing or new: {sorted(expected.keys() ^ found.keys())[:3]}"
        return
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            yield f"{name} differs"
            return


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """Loads every tensor of model and optimizer in a checkpoint, unsharded, by its dotted name."""
    reader = CheckpointReader(checkpoint / STATE_FOLDER)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    reader.load(state)
    return state
