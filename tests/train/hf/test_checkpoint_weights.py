"""Rows of a checkpoint are those that torch.distributed.checkpoint loads, however they were sharded."""

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


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    weights = CheckpointWeights(tmp_path)
    weights.read("rows")
    (file,) = (tmp_path / STATE_FOLDER).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="ends too early"):
        weights.read("rows")


def test_a_row_costs_the_memory_of_a_row(tmp_path: Path) -> None:
    def save(_: Topology) -> None:
        dcp.save({f"{WRAPPER}large": torch.ones(64, 1 << 20)}, checkpoint_id=tmp_path / STATE_FOLDER)

    def read(_: Topology) -> int:
        weights = CheckpointWeights(tmp_path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert all(weights.read("large", row, row + 1).sum() == 1 << 20 for row in range(64))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    run_ranks(1, save)
    (kilobytes,) = run_ranks(1, read)
    assert kilobytes < 64 * 1024, "a quarter of the tensor, sixteen of its rows"
