"""The comparison with transformers passes equal models and detects differences."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from train.hf import check
from train.hf.__main__ import main
from train.hf.export import write_folder
from train.hf.weights import open_weights
from train.model.decoder import Decoder
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe

MakeRun = Callable[[Recipe], tuple[Path, Decoder]]
YAMLS = Path(__file__).parents[3] / "yamls"


def test_an_export_passes_and_a_changed_one_does_not(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(load_recipe(YAMLS / "smoke.yaml"), model=check.SMALL_MODELS["LLaMA"])
    run, _ = make_run(recipe)
    out = tmp_path / "out"
    write_folder(replace(open_weights(run), recipe=None), out)  # This run has no tokenizer.
    assert main(["check", str(run), str(out)]) == 0
    assert "16 of 16" in capsys.readouterr().out
    file = out / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][7] += 0.1
    save_file(weights, file, metadata={"format": "pt"})
    assert main(["check", str(run), str(out)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_import_and_export_must_give_the_bytes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SMALL_MODELS", {"Mixtral": check.SMALL_MODELS["Mixtral"]})
    monkeypatch.setattr(check, "NEWER_MODELS", {})
    (row,) = check.compare_all()
    assert row.passed and row.same_bytes and row.architecture == "MixtralForCausalLM"
    assert not replace(row, same_bytes=False).passed
    assert not replace(row, same_tokens=check.NEW_TOKENS - 1).passed


def test_a_folder_that_is_no_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path), str(tmp_path)]) == 2
    assert "is not an export; config.json is missing" in capsys.readouterr().err
