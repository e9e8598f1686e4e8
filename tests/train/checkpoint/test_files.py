"""Checkpoints are restored exactly; damage is detected; the newest valid checkpoint is used."""

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train.checkpoint.files import (
    CheckpointError,
    Progress,
    check_checkpoint,
    keep_newest,
    load_checkpoint,
    newest_whole_checkpoint,
    restore_random_states,
)
from train.checkpoint.saver import CheckpointSaver
from train.recipe.topology import Topology

ALONE = Topology()


def _trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = nn.Linear(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _save(root: Path, batch: int, keep_last: int = 9) -> Path:
    return _save_state(root, *_trained(3), batch, keep_last)


def _save_state(
    root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, keep_last: int = 9
) -> Path:
    saver = CheckpointSaver(root, ALONE, keep_last)
    saver.start(model, optimizer, Progress(batch, batch * 8, batch * 80, 1.5))
    saved = saver.wait()
    assert saved is not None and saved.folder is not None, saved
    assert 0 < saved.copy_seconds < saved.seconds
    return saved.folder


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = _trained(3)
    folder = _save_state(tmp_path, model, optimizer, 3)
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    other, other_optimizer = _trained(1)
    assert load_checkpoint(folder, other, other_optimizer, ALONE) == Progress(3, 24, 240, 1.5)
    assert restore_random_states(folder, ALONE)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items())
    for saved, loaded in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(saved[k], loaded[k]) for k in saved)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_damage_is_found_and_the_newest_whole_one_used(tmp_path: Path, damage: object) -> None:
    whole, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    assert newest_whole_checkpoint(tmp_path) == (newer, [])
    assert callable(damage)
    damage(next((newer / "state").glob("*.distcp")))
    with pytest.raises(CheckpointError, match=r"distcp"):
        check_checkpoint(newer)
    found, complaints = newest_whole_checkpoint(tmp_path)
    assert found == whole and len(complaints) == 1 and "\n" not in complaints[0]


def test_a_save_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    whole, cut = _save(tmp_path, 1), _save(tmp_path, 2)
    (cut / "manifest.json").unlink()
    cut.rename(cut.with_name(cut.name + ".partial"))
    assert newest_whole_checkpoint(tmp_path) == (whole, [])
    assert _save(tmp_path, 2).name == "batch-00000002"


def test_only_the_newest_are_kept_and_never_none(tmp_path: Path) -> None:
    folders = [_save(tmp_path, batch) for batch in (1, 2, 3)]
    (tmp_path / "batch-00000004.partial").mkdir()
    keep_newest(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == folders[1:]
    keep_newest(tmp_path, 1)
    assert list(tmp_path.iterdir()) == folders[2:]


def test_what_is_not_whole_does_not_count_among_the_kept(tmp_path: Path) -> None:
    whole, cut = _save(tmp_path, 1), _save(tmp_path, 2)
    _truncate(next((cut / "state").glob("*.distcp")))
    keep_newest(tmp_path, 1)
    assert newest_whole_checkpoint(tmp_path)[0] == whole


def test_training_may_change_weights_while_they_are_written(tmp_path: Path) -> None:
    model, optimizer = _trained(3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saver = CheckpointSaver(tmp_path, ALONE, 1)
    saver.start(model, optimizer, Progress(3, 24, 240, 1.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    saved = saver.wait()
    assert saved is not None and saved.folder is not None
    other, other_optimizer = _trained(1)
    load_checkpoint(saved.folder, other, other_optimizer, ALONE)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_full_disk_ends_the_save_and_leaves_the_one_before(tmp_path: Path) -> None:
    before = _save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = CheckpointSaver(tmp_path, ALONE, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        saver.start(*_trained(4), Progress(2, 16, 160, 1.5))
        saved = saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved is not None and saved.folder is None
    assert "rank 0" in saved.error and "\n" not in saved.error
    assert list(tmp_path.iterdir()) == [before]
    assert newest_whole_checkpoint(tmp_path) == (before, [])
    assert saver.wait() is None and _save(tmp_path, 2).name == "batch-00000002"


def test_every_file_but_the_manifest_has_a_checksum(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    listed = set(json.loads((folder / "manifest.json").read_text())["files"])
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert listed == found - {"manifest.json"}
