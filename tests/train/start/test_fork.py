"""A fork is the old run bit for bit until it is changed, records the changes, and only reads the old run."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.train.recipe.test_keys import with_value
from tests.train.start.test_resume import ALONE, RECIPE, save
from train.hf.start import check_start
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.schema import Balance, OnExisting, OptimizerKind, Recipe
from train.record.changes import read_changes
from train.record.files import sha256
from train.record.metrics import MEASURED
from train.record.run_folder import claim_run_folder
from train.record.step_log import read_steps
from train.start.resume import find_checkpoint, keep

TinyRecipe = Callable[..., Recipe]
DIED = 9


def figures(folder: Path) -> list[dict[str, Any]]:
    """Returns a run's metrics without what is measured: times and memory."""
    lines = read_steps(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time", *MEASURED))} for line in lines]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Returns digest and time of change of every file of a run but its lease."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "lease"]
    return {str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns) for path in files}


def die_at_call(place: int, functions: Sequence[tuple[Any, str]]) -> None:
    """Ends this process, like a kill, where one of these functions is called so many times."""
    calls = itertools.count()

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            if next(calls) == place:
                os._exit(DIED)
            return work(*words, **options)

        return call

    for owner, name in functions:
        setattr(owner, name, dying(getattr(owner, name)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards") / "tiny"


@pytest.mark.slow
def test_a_fork_continues_as_the_old_run_did_and_records_what_is_changed(
    tmp_path: Path, shards: Path, tiny_recipe: TinyRecipe
) -> None:
    from data.audit.__main__ import main as audit
    from train.main import main

    def start(name: str, *overrides: str) -> list[dict[str, Any]]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(tiny_recipe(tmp_path, shards, name, "checkpoint.keep_last=9")))
        assert main([str(file), *overrides]) == 0
        return figures(tmp_path / name)

    old, fork = start("old"), f"start.run={tmp_path / 'old'}"
    before = contents(tmp_path / "old")
    assert start("same", fork, "start.batch=4") == old
    for name in ("data_log.jsonl", "expert_load.jsonl"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    assert [(change.batch, change.keys) for change in read_changes(tmp_path / "same")] == [(4, ())]
    # Other rates and a longer run: the same up to the first update.
    edits = ("optimizer.learning_rate=0.02", "training.duration_tokens=8192", "training.clip_norm=0.5")
    changed = start("changed", fork, "start.batch=8", *edits)
    assert changed[:8] == old[:8] and len(changed) == 16
    assert changed[8]["loss/train"] == old[8]["loss/train"] and changed[9] != old[9]
    assert changed[8]["learning_rate"] != old[8]["learning_rate"]
    (change,) = read_changes(tmp_path / "changed")
    assert (change.batch, change.tokens, change.fork_of) == (8, 4096, str(tmp_path / "old"))
    assert {each.key: (each.before, each.now) for each in change.keys} == {
        "optimizer.learning_rate": (0.01, 0.02),
        "training.clip_norm": (1.0, 0.5),
        "training.duration_tokens": (6144, 8192),
    }
    report = (tmp_path / "changed/report.html").read_text()
    assert "fork of" in report and "optimizer.learning_rate" in report
    # Nothing of the old run is written, and it may go.
    assert contents(tmp_path / "old") == before
    shutil.rmtree(tmp_path / "old")
    assert start("same", fork, "start.batch=4") == old
    assert audit([str(tmp_path / "changed")]) == 0


@pytest.mark.slow
def test_a_decay_from_a_checkpoint_of_the_stable_phase_is_that_of_the_run_that_planned_it(
    tmp_path: Path, shards: Path, tiny_recipe: TinyRecipe
) -> None:
    """With Muon and an average of the weights, whose states the branch takes over too."""
    from launch.verify.equality import read_state, unequal
    from train.main import main

    own = ["schedule.kind=wsd", "schedule.decay_tokens=2048", "schedule.final_share=0", "schedule.decay=sqrt"]
    own += ["optimizer.kind=muon", "optimizer.average_decay=0.9", "checkpoint.keep_last=9"]

    def start(name: str, tokens: int, *overrides: str) -> list[dict[str, Any]]:
        file = tmp_path / f"{name}.yaml"
        recipe = tiny_recipe(tmp_path, shards, name, *own, f"training.duration_tokens={tokens}")
        file.write_text(to_yaml(recipe))
        assert main([str(file), *overrides]) == 0
        return figures(tmp_path / name)

    trunk, planned = start("trunk", 6144), start("planned", 4096)
    branch = start("branch", 4096, f"start.run={tmp_path / 'trunk'}", "start.batch=4")
    assert branch == planned and branch[:4] == trunk[:4] and branch[4] != trunk[4]
    assert branch[-1]["learning_rate"] == 0.0
    states = [read_state(tmp_path / name / "checkpoints/batch-00000008") for name in ("planned", "branch")]
    assert any(name.endswith(".average") for name in states[0])
    assert not list(unequal(*states))


def test_what_a_fork_cannot_change_is_said_before_anything_is_built(
    tmp_path: Path, tiny_recipe: TinyRecipe
) -> None:
    for name in ("checkpoints/batch-00000004", "checkpoints/batch-00000008"):
        (tmp_path / "old" / name).mkdir(parents=True)
    old = tiny_recipe(tmp_path, tmp_path / "s", "old")
    (tmp_path / "old/recipe.yaml").write_text(to_yaml(old))
    fork = with_value(replace(old, name="new"), ["start", "run"], str(tmp_path / "old"))
    (line, change) = check_start(with_value(fork, ["schedule", "final_share"], 0.2), "r.yaml")
    assert line == f"new is a fork of {tmp_path / 'old'} at batch 8"
    assert change == "schedule.final_share: 0.1 before, 0.2 now"
    for key, value, expected in (
        ("seed", 3, r"seed: is 3, but .*old was trained with 17, and a fork continues"),
        ("optimizer.kind", OptimizerKind.lion, r"optimizer.kind: is lion, but .* trained with adamw"),
        ("model.moe.balance", Balance.bias, r"model.moe.balance: is bias"),
        ("model.d_model", 64, r"model.d_model: is 64, but the weights .* have 32"),
        ("tokenizer.vocab_size", 300, "tokenizer: trained tokenizer of 300 ids is not"),
        ("start.batch", 6, r"start.batch: is 6, but .*old has checkpoints of batches 4, 8"),
        ("start.run", "nowhere", "start.run: nowhere is no run with a checkpoint"),
    ):
        with pytest.raises(UserError, match=expected):
            check_start(with_value(fork, key.split("."), value), "r.yaml")
    itself = replace(fork, name="old", on_existing=OnExisting.overwrite)
    with pytest.raises(UserError, match=r"start.run: is .*old, the run itself"):
        check_start(itself, "r.yaml")


@pytest.mark.slow
def test_a_kill_while_the_recipe_is_kept_never_ends_resumption(tmp_path: Path) -> None:
    """Killed at every write: the next start takes the former recipe and the new one, and knows the change."""
    given = ["runs_dir=" + str(tmp_path), "name=r", "on_existing=resume", "data.corpus=null"]
    given += ["data.sequence_tokens=32", "model.max_sequence_tokens=32", "training.duration_tokens=10240"]
    given += ["data.domains={a: 1.0}", "training.global_batch_sequences=8"]
    smoke = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"
    before = load_recipe(smoke, given)
    after = load_recipe(smoke, [*given, "training.loss_chunk_tokens=64", "guard.loss_deviations=4"])
    assert RECIPE.training.duration_tokens == before.training.duration_tokens
    folder = claim_run_folder(before).folder
    save(folder, 10)
    keep(before, folder, {"a/train": "0" * 64}, find_checkpoint(before, folder, ALONE).progress)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    died = 0
    for place in range(40):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        progress = find_checkpoint(after, folder, ALONE).progress
        pid = os.fork()
        if pid == 0:
            try:
                die_at_call(place, ((os, "fsync"), (Path, "replace"), (Path, "open")))
                keep(after, folder, {"a/train": "0" * 64, "b/train": "1" * 64}, progress)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, DIED)
        died += status == DIED
        recipe = (before, after)[place % 2]
        assert claim_run_folder(recipe).recipe == recipe
        assert find_checkpoint(recipe, folder, ALONE).progress == progress
        keep(after, folder, {"a/train": "0" * 64}, progress)
        assert (folder / "recipe.yaml").read_text() == to_yaml(after)
        (change,) = read_changes(folder)
        assert [each.key for each in change.keys] == ["guard.loss_deviations", "training.loss_chunk_tokens"]
        assert json.loads((folder / "changes.json").read_bytes())[0]["keys"] == [
            asdict(each) for each in change.keys
        ]
        if status == 0:
            break
    assert died > 8 and status == 0
