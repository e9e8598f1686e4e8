"""Rows of a checkpoint equal those that torch.distributed.checkpoint loads, for any sharding."""

import pickle
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from launch.verify.forked_ranks import run_ranks
from train.hf.checkpoint_weights import WRAPPER, CheckpointWeights
from train.hf.folders import STATE_FOLDER
from train.recipe.errors import UserError
from train.recipe.topology import Topology

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate(), "bf16": Shard(0)}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {name: torch.randn(7, 6, generator=generator) for name in PLACEMENTS}
    found["bf16"] = found["bf16"].bfloat16()
    return found


def _save(folder: Path, world: int) -> None:
    def work(_: Topology) -> None:
        state = {WRAPPER + name: tensor for name, tensor in _tensors().items()}
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            placed = PLACEMENTS.values()
            state = {
                name: distribute_tensor(tensor, mesh, [placement])
                for (name, tensor), placement in zip(state.items(), placed, strict=True)
            }
        dcp.save(state, checkpoint_id=folder / STATE_FOLDER)

    run_ranks(world, work)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_are_those_that_were_saved(world: int, tmp_path: Path) -> None:
    _save(tmp_path, world)
    weights = CheckpointWeights(tmp_path)
    for name, tensor in _tensors().items():
        assert weights.tensors[name].dtype == tensor.dtype and weights.tensors[name].shape == tensor.shape
        for first in range(7):
            for last in range(first + 1, 8):
                assert torch.equal(weights.read(name, first, last), tensor[first:last]), (name, first, last)
        assert torch.equal(weights.read(name), tensor)


def test_a_file_that_ends_early_is_a_line(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    weights = CheckpointWeights(tmp_path)
    (file,) = (tmp_path / STATE_FOLDER).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"state: rows cannot be loaded \(") as caught:
        weights.read("rows")
    assert "\n" not in str(caught.value)


def test_a_tensor_of_which_parts_are_missing_is_named(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    path = tmp_path / STATE_FOLDER / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata[f"{WRAPPER}columns"].chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="parts of columns are missing"):
        CheckpointWeights(tmp_path)


def test_only_the_tensor_asked_for_is_read_and_only_once(tmp_path: Path) -> None:
    state = {f"{WRAPPER}{name}": torch.ones(8, 1 << 20) for name in "abcdef"}
    run_ranks(1, lambda _: dcp.save(state, checkpoint_id=tmp_path / STATE_FOLDER))

    def read(_: Topology) -> tuple[int, bool]:
        weights = CheckpointWeights(tmp_path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows = [weights.read("a", row, row + 1) for row in range(8)]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return memory, all(
            row.data_ptr() == whole.data_ptr() for row, whole in zip(rows, weights.read("a"), strict=True)
        )

    ((kilobytes, shared),) = run_ranks(1, read)
    assert kilobytes < 4 * 32 * 1024, "four of the six tensors"
    assert shared
