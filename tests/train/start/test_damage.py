"""One damaged bit in any file of a run ends in the older checkpoint or one line, never in a traceback."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from launch.restart.history import read_log
from tests.train.start.test_resume import save
from train.checkpoint.files import read_progress
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record.evaluations import add_result, drop_results_after
from train.record.lease import release
from train.record.run_folder import SUMMARY_FILE, claim_run_folder, keep_data
from train.record.skips import GuardDecision, read_decisions, write_decisions
from train.record.step_log import STEP, StepLog, read_steps
from train.record.summary import Summary, read_summary, write_summary
from train.report.run_record import read_run
from train.start.resume import RECORDS, drop_after, find_checkpoint
from train.tracking.facts import RunFacts
from train.tracking.uploader import collect_facts

ALONE = Topology()
FLIPS = 2
"""Bits that are flipped in each file."""
DIGESTS = {"code/train": "a" * 64}


def small_run(runs: Path) -> Recipe:
    """Leaves what a run of 30 steps with checkpoints at 10 and 20 has in its folder."""
    smoke = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"
    given = [f"runs_dir={runs}", "name=r", "on_existing=resume", "data.domains={a: 1.0}", "data.corpus=null"]
    recipe = load_recipe(smoke, [*given, "data.sequence_tokens=32", "model.max_sequence_tokens=32"])
    recipe = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, duration_tokens=10240, global_batch_sequences=8)
    )
    folder = claim_run_folder(recipe).folder
    for batch in (10, 20):
        save(folder, batch)
    for name in RECORDS:
        log = StepLog(folder / name)
        for step in range(1, 31):
            line = {"tokens": step * 256, "time": 1.0 * step, "loss/train": 1 / step, "shares": [[0.5, 0.5]]}
            log.write(step, line)
        log.close()
    keep_data(folder, DIGESTS)
    write_decisions(folder, [GuardDecision(400, 408, 51, ["spike"])])
    add_result(folder, "suite", "s", 10, {"scores": {"a": 1.0}})
    collect_facts(folder, recipe, [], "", {}).write(folder)
    find_checkpoint(recipe, folder, ALONE)
    release(folder)
    return recipe


def start(recipe: Recipe) -> int:
    """Does what a start does with a run's folder; returns the batch that it resumes from."""
    folder = claim_run_folder(recipe, grace_seconds=0.0).folder
    try:
        resumed = find_checkpoint(recipe, folder, ALONE)
        if resumed.checkpoint is not None:
            assert read_progress(resumed.checkpoint).batch == resumed.progress.batch
        keep_data(folder, DIGESTS)
        drop_after(folder, resumed.progress.batch)
        drop_results_after(folder, resumed.progress.batch)
        collect_facts(folder, recipe, [], "", {})
        return resumed.progress.batch
    finally:
        release(folder)


@pytest.mark.slow
def test_one_flipped_bit_anywhere(tmp_path: Path) -> None:
    recipe = small_run(tmp_path / "runs")
    folder, whole = tmp_path / "runs/r", tmp_path / "whole"
    shutil.copytree(folder, whole)
    assert start(recipe) == 20
    place, outcomes = random.Random(23), Counter[tuple[str, object]]()
    # tests/train/record/test_lease.py damages leases: an unknown holder is waited for.
    shutil.rmtree(whole / "lease")
    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    assert len(files) > 16
    for name in files:
        for _ in range(FLIPS):
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            damaged = bytearray((folder / name).read_bytes())
            damaged[place.randrange(len(damaged))] ^= 1 << place.randrange(8)
            (folder / name).write_bytes(damaged)
            try:
                batch: object = start(recipe)
            except UserError as error:
                assert "\n" not in str(error)
                batch = "refused"
            # Checkpoints are whole or not taken; whatever else is damaged changes nothing or is refused.
            in_newest = "batch-00000020" in str(name)
            assert batch in ({10, 20} if in_newest else {20, "refused"}), (name, batch)
            outcomes[name.parts[0], batch] += 1
            if batch == 20:
                for each in RECORDS:
                    steps = [line[STEP] for line in read_steps(folder / each)]
                    assert len(steps) >= 18 and max(steps) <= 20 and steps == sorted(set(steps))
            for read in (read_run, RunFacts.read, read_decisions):
                try:
                    read(folder)
                except UserError as error:
                    assert "\n" not in str(error)
    # The logs and the notes of other processes never hinder a start.
    for name in (*RECORDS, "saved.json", "tracking.json"):
        assert outcomes[name, "refused"] == 0, (name, outcomes)
    assert outcomes["checkpoints", 10] >= FLIPS


def test_a_damaged_summary_and_log_of_tries_are_one_line_or_passed_over(tmp_path: Path) -> None:
    values = {field.name: 1 for field in dataclasses.fields(Summary)} | {"datasets": []}
    write_summary(tmp_path, Summary(**values))  # type: ignore[arg-type]
    line = {
        "try": 1,
        "begun": 1.0,
        "seconds": 1.0,
        "excluded": None,
        "status": 1,
        "kind": "k",
        "line": "l",
        "batch": 1,
    }
    tries = json.dumps(line | {"checkpoint": 0, "rank": None, "host": None}) + "\n"
    (tmp_path / "restarts.jsonl").write_text(3 * tries)
    place = random.Random(7)
    for name in (SUMMARY_FILE, "restarts.jsonl"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[place.randrange(len(damaged))] ^= 1 << place.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            try:
                read_summary(tmp_path)
            except UserError as error:
                assert "is damaged" in str(error)
            assert 1 <= len(read_log(tmp_path)) <= 3
        (tmp_path / name).write_bytes(whole)
