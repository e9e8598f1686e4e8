"""Checkpoints are restored exactly; damage is detected; the newest valid checkpoint is used."""

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from train.checkpoint.files import (
    CheckpointError,
    Progress,
    check_checkpoint,
    keep_newest,
    newest_whole_checkpoint,
    read_progress,
    restore_random_states,
)
from train.checkpoint.loading import load_checkpoint
from train.checkpoint.saver import CheckpointSaver
from train.recipe.errors import UserError
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


@pytest.mark.parametrize("joined", [True, False], ids=["fewer groups", "more groups"])
def test_an_optimizer_of_other_groups_is_restored(tmp_path: Path, joined: bool) -> None:
    """Layouts differ in their groups: routers are one of their own where all else is sharded."""

    def trained(steps: int, is_joined: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(steps)
        model = nn.Linear(5, 4)
        parameters = list(model.parameters())
        groups = [parameters] if is_joined else [[parameter] for parameter in parameters]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.1 * steps)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 5)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    (model, optimizer), (other, other_optimizer) = trained(3, not joined), trained(1, joined)
    load_checkpoint(_save_state(tmp_path, model, optimizer, 3), other, other_optimizer, ALONE)
    for mine, loaded in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, loaded)
        for name, value in optimizer.state[mine].items():
            assert torch.equal(value, other_optimizer.state[loaded][name])
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.1] * (1 if joined else 2)
    other_optimizer.step()


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


@pytest.mark.parametrize("has_digest", [True, False])
def test_one_flipped_bit_in_a_manifest_takes_the_checkpoint_before(tmp_path: Path, has_digest: bool) -> None:
    before, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    file = newer / "manifest.json"
    tree = json.loads(file.read_bytes())
    if not has_digest:  # As written by former versions.
        del tree["digest"]
    file.write_text(json.dumps(tree, indent=1))
    whole, taken, random_place = file.read_bytes(), 0, random.Random(34)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[random_place.randrange(len(whole))] ^= 1 << random_place.randrange(8)
        file.write_bytes(damaged)
        found, complaints = newest_whole_checkpoint(tmp_path)
        assert all("\n" not in line for line in complaints)
        taken += found == newer
        if found == newer:
            assert json.loads(damaged) == tree  # A blank became another, or a letter its escape.
        else:
            assert found == before and len(complaints) == 1
    assert taken < 40


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree | {"world_size": 2},
        lambda tree: tree | {"world_size": 0},
        lambda tree: tree | {"world_size": "1"},
        lambda tree: tree | {"world_size": 10**15},
        lambda tree: tree | {"more": 1},
        lambda tree: tree | {"files": []},
        lambda tree: tree | {"files": {"../../other": {"bytes": 1, "sha256": "0"}, **tree["files"]}},
        lambda tree: tree | {"files": {"/etc/hostname": {"bytes": 1, "sha256": "0"}, **tree["files"]}},
        lambda tree: tree | {"files": {**tree["files"], "rank-0.json": {"bytes": 1}}},
        lambda tree: tree | {"files": {n: e for n, e in tree["files"].items() if n != "progress.json"}},
        lambda tree: [tree],
    ],
)
def test_a_manifest_of_another_form_is_none(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    folder = _save(tmp_path, 1)
    tree = json.loads((folder / "manifest.json").read_bytes())
    del tree["digest"]
    (folder / "manifest.json").write_text(json.dumps(tree))
    check_checkpoint(folder)
    (folder / "manifest.json").write_text(json.dumps(change(tree)))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        check_checkpoint(folder)


def test_a_persons_copy_of_a_checkpoint_is_neither_taken_nor_removed(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    for name in ("batch-00000001.bak", "batch-00000009 (copy)", "batch-best"):
        shutil.copytree(folder, tmp_path / name)
    assert newest_whole_checkpoint(tmp_path) == (folder, [])
    keep_newest(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 4


def test_progress_of_another_version_is_one_line(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    for content in ("", "[]", '{"batch": 1, "future": 2}'):
        (folder / "progress.json").write_text(content)
        with pytest.raises(UserError, match=r"progress\.json can't be read .*; another version"):
            read_progress(folder)
