"""The main job end to end on a tiny recipe: its files, that it learns, that it resumes exactly."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.step_log import read_steps

pytestmark = pytest.mark.slow

TinyRecipe = Callable[..., Recipe]


class CutOffError(Exception):
    """Stand-in for a process that ends in the middle of a run."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards") / "tiny"


def _run(recipe: Recipe) -> list[dict[str, Any]]:
    from train.run import run

    assert run(recipe, Topology()) == 0
    return read_steps(Path(recipe.runs_dir) / recipe.name / "metrics.jsonl")


def _trained(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the figures of a step without times."""
    return [
        {k: v for k, v in step.items() if k != "time" and not k.startswith(metrics.MEASURED)}
        for step in steps
    ]


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_an_interrupted_run_resumes_bit_for_bit(
    tmp_path: Path, shards: Path, tiny_recipe: TinyRecipe, balance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.record.console import Console

    choice = [f"model.moe.balance={balance}", f"model.mtp={str(balance == 'bias').lower()}"]
    if balance == "bias":  # clipped in every step
        choice += ["optimizer.qk_clip=0.001", "model.clip_qkv=null"]
    whole = _run(tiny_recipe(tmp_path, shards, "whole", *choice))
    assert all(("loss/mtp" in step) == (balance == "bias") for step in whole)
    assert all((step.get("largest_logit", 0) > 0.001) == (balance == "bias") for step in whole)
    assert [step["step"] for step in whole] == list(range(1, 13))

    def cut_off(self: Console, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == 7:
            raise CutOffError

    cut = tiny_recipe(tmp_path, shards, "cut", *choice)
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(Console, "batch_end", cut_off)
        _run(cut)
    folder = tmp_path / "cut"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["batch-00000004"]
    assert not (folder / "summary.json").exists()
    # Its weights are those of the checkpoint: none are drawn first.
    monkeypatch.setattr("train.model.init.fill_rows", mock.Mock(side_effect=AssertionError))
    assert _trained(_run(cut)) == _trained(whole)


def test_what_a_run_leaves_and_that_it_learns(
    tmp_path: Path, shards: Path, tiny_recipe: TinyRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, shards, "learns", "training.duration_tokens=61440")
    steps = _run(recipe)
    printed = capsys.readouterr().out
    folder = tmp_path / "learns"
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "report.html", "summary.json", "sample.txt"} <= {
        p.name for p in folder.iterdir()
    }
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert str(folder / "report.html") in printed and "unigram" in printed
    summary = json.loads((folder / "summary.json").read_text())
    for domain, loss in summary["validation_loss"].items():
        # Two layers of width 32 and 120 steps: one nat below a model that ignores token frequencies.
        assert loss < math.log(recipe.model.vocab_size) - 1
        assert 0 < summary["unigram_entropy"][domain] < math.log(recipe.model.vocab_size)
        assert steps[-1][f"loss/validation/{domain}"] == loss
    assert len(list((folder / "checkpoints").iterdir())) == recipe.checkpoint.keep_last

    # The same command again: the run is complete, so nothing is trained or overwritten.
    before = (folder / "metrics.jsonl").read_bytes()
    assert _run(recipe) == steps
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_from_another_and_validates_what_it_does_not_train_on(
    tmp_path: Path, shards: Path, tiny_recipe: TinyRecipe
) -> None:
    only_code = ("data.domains={code: 1.0}", "data.validation_domains=[prose]")
    old = _run(tiny_recipe(tmp_path, shards, "old", *only_code))[-1]
    # A tiny learning rate keeps the weights of step 0, so their losses are those of the old run.
    new = (
        "data.domains={prose: 1.0}",
        "data.validation_domains=[code]",
        f"start.weights={tmp_path / 'old'}",
        "training.duration_tokens=512",
        "optimizer.learning_rate=1e-12",
        "schedule.warmup_tokens=0",
    )
    for moments in ("fresh", "restored"):
        recipe = tiny_recipe(tmp_path, shards, f"new-{moments}", *new, f"start.optimizer={moments}")
        now = _run(recipe)[-1]
        for domain in ("code", "prose"):
            key = f"loss/validation/{domain}"
            assert now[key] == pytest.approx(old[key], abs=1e-6)
    read = json.loads((tmp_path / "old" / "summary.json").read_text())["datasets"]
    assert [dataset["name"] for dataset in read] == ["code/train", "code/validation", "prose/validation"]
