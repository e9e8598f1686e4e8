"""Checkpoints: what is saved comes back; what is damaged is found; the newest whole one is used."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train.checkpoint import (
    CheckpointError,
    Progress,
    check_checkpoint,
    keep_newest,
    load_checkpoint,
    newest_whole_checkpoint,
    restore_random_states,
    save_checkpoint,
)
from train.topology import Topology

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


def _save(root: Path, batch: int) -> Path:
    model, optimizer = _trained(3)
    return save_checkpoint(root, model, optimizer, Progress(batch, batch * 8, batch * 80, 1.5), ALONE)


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = _trained(3)
    folder = save_checkpoint(tmp_path, model, optimizer, Progress(3, 24, 240, 1.5), ALONE)
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
