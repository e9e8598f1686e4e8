"""Checkpoints run no code: what is not plain data is refused in one line, and ours are all read."""

import os
import pathlib
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from launch.verify.equality import read_state
from launch.verify.forked_ranks import run_ranks
from train.checkpoint.files import Progress
from train.checkpoint.loading import load_checkpoint
from train.checkpoint.reading import CheckpointReader
from train.checkpoint.saver import CheckpointSaver
from train.hf.checkpoint_weights import CheckpointWeights
from train.hf.initial_weights import restore_optimizer
from train.layout.optim import build_optimizer
from train.recipe.errors import UserError
from train.recipe.schema import Optimizer, OptimizerKind
from train.recipe.topology import Topology

ALONE = Topology()


class RunsWhenUnpickled:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.file),)


def _trained(kind: OptimizerKind, world: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("shard",)))
    optimizer = build_optimizer(model, Optimizer(kind=kind, learning_rate=0.1))
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def _save(
    root: Path, kind: OptimizerKind = OptimizerKind.adamw, topology: Topology = ALONE
) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model, optimizer = _trained(kind, topology.world_size)
    saver = CheckpointSaver(root, topology, keep_last=1)
    saver.start(model, optimizer, Progress(1, 8, 80, 1.5))
    saved = saver.wait()
    assert saved is not None and saved.folder is not None, saved
    return saved.folder, model, optimizer


def _load(folder: Path) -> None:
    model, optimizer = _trained(OptimizerKind.adamw)
    load_checkpoint(folder, model, optimizer, ALONE)


def _restore(folder: Path) -> None:
    model, optimizer = _trained(OptimizerKind.adamw)
    restore_optimizer(folder, model, optimizer, ALONE)


@pytest.mark.parametrize("door", [_load, _restore, read_state, CheckpointWeights])
def test_metadata_that_runs_code_is_refused_in_one_line(door: Callable[[Path], Any], tmp_path: Path) -> None:
    folder, _, _ = _save(tmp_path)
    file = folder / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = RunsWhenUnpickled(tmp_path / "ran")
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata: names posix\.mkdir, which .* was not loaded") as caught:
        door(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run code"


def test_a_value_that_runs_code_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, _, _ = _save(tmp_path)
    state: dict[str, Any] = {"optimizer": {"param_groups": [{"lr": RunsWhenUnpickled(tmp_path / "ran")}]}}
    dcp.save(state, checkpoint_id=folder / "state", no_dist=True)
    reader = CheckpointReader(folder / "state")
    with pytest.raises(UserError, match=r"state: optimizer\.param_groups\.0\.lr is no plain value") as caught:
        reader.load({"optimizer": {"param_groups": [{"lr": 0.0}]}})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    dcp.load({"optimizer": {"param_groups": [{"lr": 0.0}]}}, checkpoint_id=folder / "state", no_dist=True)
    assert (tmp_path / "ran").exists(), "the value would have run code"


@pytest.mark.parametrize(
    "written",
    [
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nV__init__\ntR.",
        b"ctorch.serialization\n_get_layout\n(Vload\ntR.",
        b"ctorch\nload\n.",
        b"cos\nsystem\n(Vtrue\ntR.",
        b"ctorch\nSize\n((I1\nI2\nttR.",
        b"truncated",
        b"",
    ],
)
def test_nothing_else_is_read(written: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(written)
    with pytest.raises(UserError) as caught:
        CheckpointReader(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/.metadata: ") and "\n" not in str(caught.value)


def test_a_folder_without_metadata_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata: cannot be read \(FileNotFoundError\)"):
        CheckpointReader(tmp_path)


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder, _, _ = _save(tmp_path)
    file = folder / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"points to \.\./\.\./secret, outside its folder"):
        CheckpointReader(folder / "state")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(OptimizerKind))
@pytest.mark.parametrize("world", [1, 2])
def test_what_we_write_is_read_as_torch_reads_it(kind: OptimizerKind, world: int, tmp_path: Path) -> None:
    def work(topology: Topology) -> bool:
        folder, model, optimizer = _save(tmp_path, kind, topology)
        expected = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        load_checkpoint(folder, model, optimizer, topology)
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}, "rates are the recipe's"
        return all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))

    assert all(run_ranks(world, work))
    (state,) = (tmp_path / "batch-00000001").glob("state")
    ours = CheckpointReader(state)
    theirs = dcp.FileSystemReader(state).read_metadata()
    assert ours.metadata.state_dict_metadata == theirs.state_dict_metadata
    assert ours.metadata.storage_data == theirs.storage_data
    assert ours.metadata.planner_data == theirs.planner_data


def test_reading_by_one_process_warns_of_nothing(tmp_path: Path) -> None:
    folder, model, optimizer = _save(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_checkpoint(folder, model, optimizer, ALONE)
    assert not [each.message for each in seen if "torch.distributed" in str(each.message)]


def test_metadata_of_another_python_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 has a module of its own for the class of paths."""
    folder, _, _ = _save(tmp_path)
    file = folder / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    with monkeypatch.context() as other:
        other.setitem(sys.modules, "pathlib._local", pathlib)
        other.setattr(pathlib.PosixPath, "__module__", "pathlib._local")
        file.write_bytes(pickle.dumps(metadata))
    assert b"pathlib._local" in file.read_bytes()
    _load(folder)
