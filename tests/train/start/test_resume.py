"""A run resumes from its newest checkpoint whose skips still match."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from train.checkpoint.files import Progress, keep_newest
from train.recipe.curriculum import Skip, plan_stages, to_json
from train.recipe.errors import UserError
from train.recipe.schema import Checkpoint, Data, DataSkip, Recipe, Training
from train.recipe.topology import Topology
from train.record.run_folder import CHECKPOINTS_FOLDER, note_saved
from train.record.skips import GuardDecision, write_decisions
from train.start.resume import drop_after, find_checkpoint

ALONE = Topology()
RECIPE = Recipe(data=Data(domains={"a": 1.0}, sequence_tokens=32), training=Training(10240, 8, 4))
"""40 batches of 8 positions."""


def save(folder: Path, batch: int, *skips: Skip) -> Path:
    """Saves a checkpoint with little more than its progress."""
    import torch

    from train.checkpoint.saver import CheckpointSaver

    model = torch.nn.Linear(2, 2)
    curriculum = dataclasses.replace(plan_stages(RECIPE), skips=skips)
    saver = CheckpointSaver(folder / CHECKPOINTS_FOLDER, ALONE, keep_last=9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver.start(model, optimizer, Progress(batch, batch * 8, batch * 256, 1.0, to_json(curriculum)))
    saved = saver.wait()
    assert saved is not None and saved.folder is not None, saved
    return saved.folder


def declaring(first: int, end: int) -> Recipe:
    return dataclasses.replace(
        RECIPE, data=dataclasses.replace(RECIPE.data, skips=[DataSkip(first, end, "bad")])
    )


def test_it_goes_back_before_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch in (10, 20, 30):
        save(tmp_path, batch)
    assert find_checkpoint(RECIPE, tmp_path, ALONE).progress.batch == 30
    # Positions from the 21st batch on were trained in the third checkpoint only.
    resumed = find_checkpoint(declaring(160, 200), tmp_path, ALONE)
    assert resumed.progress.batch == 20 and resumed.curriculum.skipped == ((20, 25),)
    assert "batch-00000030: skipped other positions than the recipe does now" in capsys.readouterr().out
    root = tmp_path / CHECKPOINTS_FOLDER
    assert sorted(path.name for path in root.iterdir()) == [
        "batch-00000010",
        "batch-00000020",
        "rolled-back-00000030",
    ]
    # A checkpoint that knows of the skip is valid; set-aside ones go once the run has come as far again.
    save(tmp_path, 26, Skip(160, 200, "bad"))
    assert (root / "rolled-back-00000030").is_dir()
    save(tmp_path, 34, Skip(160, 200, "bad"))
    assert not (root / "rolled-back-00000030").exists()
    assert find_checkpoint(declaring(160, 200), tmp_path, ALONE).progress.batch == 34
    keep_newest(root, 2)
    with pytest.raises(UserError, match=r"data.skips: .*no complete checkpoint from before"):
        find_checkpoint(RECIPE, tmp_path, ALONE)
    assert find_checkpoint(declaring(160, 200), tmp_path, ALONE).progress.batch == 34


def test_records_of_later_batches_are_cut_off_though_nothing_is_left_to_train(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "data_log.jsonl", "alarms.jsonl"):
        (tmp_path / name).write_text('{"step":30}\n{"step":31}\n')
    drop_after(tmp_path, 30)
    for name in ("metrics.jsonl", "data_log.jsonl", "alarms.jsonl"):
        assert (tmp_path / name).read_text() == '{"step":30}\n'
    assert len(list(tmp_path.iterdir())) == 3


def test_what_the_guard_decided_counts_as_what_the_recipe_declares(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    write_decisions(tmp_path, [GuardDecision(152, 168, 21, ["spike"])])
    resumed = find_checkpoint(declaring(240, 248), tmp_path, ALONE)
    assert resumed.progress.batch == 10 and resumed.curriculum.skipped == ((19, 21), (30, 31))


def records(folder: Path, steps: int) -> dict[str, bytes]:
    """Writes a run's logs of some steps; returns their contents."""
    for name in ("metrics.jsonl", "data_log.jsonl"):
        (folder / name).write_text("".join(f'{{"step":{step}}}\n' for step in range(1, steps + 1)))
    return {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "data_log.jsonl")}


@pytest.mark.parametrize("gone", ["folder", "damaged", "noted", "two intervals"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path: Path, gone: str) -> None:
    recipe, steps = RECIPE, 15
    if gone == "two intervals":  # Of a run from before checkpoints were noted.
        recipe = dataclasses.replace(RECIPE, checkpoint=Checkpoint(interval_batches=10))
        steps = 20
    elif gone == "noted":
        note_saved(tmp_path, 10)
    else:
        folder = save(tmp_path, 10)
        find_checkpoint(recipe, tmp_path, ALONE)
        if gone == "damaged":
            (folder / "progress.json").write_bytes(b"")
        else:
            shutil.rmtree(tmp_path / CHECKPOINTS_FOLDER)
    kept = records(tmp_path, steps)
    with pytest.raises(
        UserError, match=rf"has trained {steps} batches, but .*checkpoints has no complete check"
    ):
        find_checkpoint(recipe, tmp_path, ALONE)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_a_run_that_was_killed_before_its_first_checkpoint_keeps_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(RECIPE, checkpoint=Checkpoint(interval_batches=10))
    assert find_checkpoint(recipe, tmp_path, ALONE).progress.batch == 0 and capsys.readouterr().out == ""
    for attempt, steps in enumerate((19, 7), 1):
        kept = records(tmp_path, steps)
        assert find_checkpoint(recipe, tmp_path, ALONE).progress.batch == 0
        drop_after(tmp_path, 0)
        assert f"had trained {steps} batches and saved none: it begins again" in capsys.readouterr().out
        aside = tmp_path / f"unsaved-{attempt}"
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == kept


def test_a_later_checkpoint_that_vanished_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 10)
    shutil.rmtree(save(tmp_path, 20))
    find_checkpoint(RECIPE, tmp_path, ALONE)
    assert capsys.readouterr().out == ""
    note_saved(tmp_path, 20)
    assert find_checkpoint(RECIPE, tmp_path, ALONE).progress.batch == 10
    assert "the checkpoint of batch 20" in capsys.readouterr().out
