"""The audit of a run whose data log comes from the loader's batches, without and with planted faults."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.audit.__main__ import main
from data.audit.lookup import documents_of_step, steps_of_document
from data.audit.proof import prove
from data.audit.run_data import RunData
from data.batch import NO_TARGET
from data.loader import build_train_loader
from data.opened import OpenedData
from data.shards.digest import digest_sequences
from data.write_shards import build_shards
from tests.data.conftest import small_documents
from train.recipe.errors import UserError
from train.recipe.preparation import Packing, Preparation
from train.recipe.reading import to_yaml
from train.recipe.schema import Phase, Recipe
from train.record.skips import GuardDecision, write_decisions

pytestmark = pytest.mark.slow

STEPS = 40
DOMAINS = ("code", "prose")

Lines = list[dict[str, Any]]


def line_of(step: int, batch: dict[str, Any]) -> dict[str, Any]:
    """The data log's line for a batch."""
    domains = {}
    for index, name in enumerate(DOMAINS):
        mine = (batch["domain_ids"] == index).numpy()
        ids, positions = batch["input_ids"].numpy()[mine], batch["sample_positions"].numpy()[mine]
        targets = int((batch["targets"].numpy()[mine] != NO_TARGET).sum())
        domains[name] = [int(mine.sum()), targets, f"{digest_sequences(ids, positions):016x}"]
    first = int(batch["sample_positions"][0])
    return {"step": step, "first": first, "length": batch["input_ids"].shape[1], "domains": domains}


WHOLE: dict[str, Any] = {
    "preparation": Preparation(packing=Packing.best_fit),
    "domains": {},
    "phases": [Phase(tokens=10_000, weights={"code": 0.7, "prose": 0.3}, sequence_tokens=64)],
}
"""Documents packed whole, and sequences of two samples."""
ON_BOTH = pytest.mark.parametrize("run", [{}, WHOLE], ids=["end to end", "whole"], indirect=True)


@pytest.fixture
def run(
    tmp_path: Path, make_recipe: Callable[..., Recipe], request: pytest.FixtureRequest
) -> tuple[Path, Lines]:
    recipe = make_recipe(tmp_path / "shards", **getattr(request, "param", {}))
    build_shards(recipe, documents=small_documents)
    batches = islice(build_train_loader(OpenedData(recipe), rank=0, world_size=1), STEPS)
    lines = [line_of(number + 1, batch) for number, batch in enumerate(batches)]
    folder = tmp_path / "run"
    folder.mkdir()
    text = to_yaml(recipe)
    for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "ffn_hidden_size", "vocab_size"):
        text = text.replace(f"{key}: ???", f"{key}: 8")
    text = text.replace("max_sequence_tokens: ???", "max_sequence_tokens: 64")
    (folder / "recipe.yaml").write_text(text.replace("learning_rate: ???", "learning_rate: 0.1"))
    return folder, lines


def faults(folder: Path, lines: Lines) -> list[str]:
    (folder / "data_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prove(RunData(folder)).faults


@ON_BOTH
def test_a_sound_run_is_proven(run: tuple[Path, Lines], capsys: pytest.CaptureFixture[str]) -> None:
    folder, lines = run
    assert faults(folder, lines) == []
    assert main([str(folder)]) == 0
    assert "nothing was skipped or read twice; the tokens of 40 steps match" in capsys.readouterr().out


def test_what_is_declared_is_listed_and_must_not_have_been_read(
    run: tuple[Path, Lines], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = run
    write_decisions(folder, [GuardDecision(76, 84, 12, ["spike: loss 9"])])
    left = [line for line in lines if line["step"] not in (10, 11)]
    assert faults(folder, left) == []
    proof = prove(RunData(folder))
    assert proof.declared == ["steps 10 to 11, positions 72 to 87: rolled back at step 12: spike: loss 9"]
    assert sum(samples for samples, _ in proof.consumed.values()) == 8 * (STEPS - 2)
    assert main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "excluded: steps 10 to 11" in shown and "nothing else was skipped" in shown
    assert "step 10 was trained, although" in faults(folder, lines)[0]
    assert faults(folder, left[:8] + left[9:])[0] == "steps 9 to 11 are missing from the data log"
    shifted = [line | {"first": line["first"] - 16} if line["step"] > 11 else line for line in left]
    assert "step 12: positions 72 to 87 were read again" in faults(folder, shifted)


def test_each_fault_is_named(run: tuple[Path, Lines]) -> None:
    folder, lines = run
    missing = lines[:6] + lines[7:]
    assert faults(folder, missing)[0] == "steps 7 to 7 are missing from the data log"
    again = [line | {"step": n + 1} for n, line in enumerate([*lines[:6], *lines[5:]])]
    assert "step 7: positions 40 to 47 were read again" in faults(folder, again)
    skipped = [line | {"step": n + 1} for n, line in enumerate(missing)]
    assert faults(folder, skipped) == ["step 7: positions 48 to 55 before it were skipped"]
    # Another step's batch at this step's positions, as from a loader that repeats itself.
    foreign = [*lines]
    foreign[9] = lines[9] | {"domains": lines[8]["domains"]}
    assert any(
        fault.startswith("step 10, prose: trained on other tokens") for fault in faults(folder, foreign)
    )
    swapped = [*lines]
    (code, prose) = (lines[9]["domains"][name] for name in DOMAINS)
    swapped[9] = lines[9] | {"domains": {"code": prose, "prose": code}}
    assert any(
        "step 10: 2 sequences of code" in f or "step 10: 3 sequences of code" in f
        for f in faults(folder, swapped)
    )
    scattered = [*lines]
    scattered[3] = lines[3] | {"first": None}
    assert any(fault.startswith("step 4: its positions") for fault in faults(folder, scattered))


def test_tokens_with_a_loss_are_those_of_the_shards(run: tuple[Path, Lines]) -> None:
    folder, lines = run
    untrained = [*lines]
    code, prose = (lines[4]["domains"][name] for name in DOMAINS)
    untrained[4] = lines[4] | {"domains": {"code": code, "prose": [prose[0], prose[1] - 1, prose[2]]}}
    assert faults(folder, untrained) == [
        f"step 5, prose: {prose[1] - 1} tokens had a loss, but {prose[1]} in the shards have a next token"
    ]
    none = [line | {"domains": {n: [c, 0, d] for n, (c, _, d) in line["domains"].items()}} for line in lines]
    assert len(faults(folder, none)) >= STEPS


def test_a_checkpoints_sums_are_those_of_the_log(run: tuple[Path, Lines]) -> None:
    folder, lines = run
    samples = {name: sum(line["domains"][name][0] for line in lines) for name in DOMAINS}
    consumed = {name: {"samples": count, "tokens": 32 * count} for name, count in samples.items()}
    progress = folder / f"checkpoints/batch-{STEPS:08d}/progress.json"
    progress.parent.mkdir(parents=True)
    (folder / "checkpoints/batch-00000050.bak").mkdir()
    for what in ("samples", "tokens"):
        progress.write_text(json.dumps({"batch": STEPS, "samples": 8 * STEPS, "consumed": consumed}))
        assert faults(folder, lines) == []
        wrong = consumed | {"code": consumed["code"] | {what: 0}}
        progress.write_text(json.dumps({"batch": STEPS, "samples": 8 * STEPS, "consumed": wrong}))
        (line,) = faults(folder, lines)
        assert line.startswith(f"the checkpoint of step {STEPS} counts 0 {what} of code, the data log ")


def test_a_damaged_line_is_a_missing_step(run: tuple[Path, Lines]) -> None:
    folder, lines = run
    for damage in ({"domains": {"code": [1, 2]}}, {"domain": {}}, {"length": None}, {"first": "x"}):
        line = {"step": 9, **damage} if "domain" in damage else lines[8] | damage
        found = faults(folder, [*lines[:8], line, *lines[9:]])
        assert found[0] == "steps 9 to 9 are missing from the data log"


def test_an_altered_shard_is_named(run: tuple[Path, Lines]) -> None:
    folder, lines = run
    shard = folder.parent / "shards/code/train/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    assert all("code: can't be compared" in fault and str(shard) in fault for fault in faults(folder, lines))


@ON_BOTH
def test_documents_and_steps_are_each_others_inverse(run: tuple[Path, Lines]) -> None:
    folder, lines = run
    faults(folder, lines)
    books = RunData(folder)
    seen = [sight for line in lines for sight in documents_of_step(books, line["step"])]
    for name in ("code/3.txt", "prose/11.txt", "prose/50.txt"):
        mine = {
            (sight.step, sight.position, sight.sample, sight.epoch)
            for sight in seen
            if sight.document == name
        }
        found = steps_of_document(books, name)
        assert {(sight.step, sight.position, sight.sample, sight.epoch) for sight in found} == mine
    assert sum(bool(steps_of_document(books, f"prose/{n}.txt")) for n in range(60)) > 30
    for name in ("nowhere", "train"):  # Most documents' lines contain the second, as their split.
        with pytest.raises(UserError, match="no domain has a document"):
            steps_of_document(books, name)
    with pytest.raises(UserError, match="it has steps 1 to 40"):
        documents_of_step(books, 41)


def test_the_digest_is_of_tokens_and_places() -> None:
    tokens = np.arange(12).reshape(3, 4)
    assert digest_sequences(tokens, np.arange(3)) != digest_sequences(tokens[::-1].copy(), np.arange(3))
