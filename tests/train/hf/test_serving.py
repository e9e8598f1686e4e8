"""Exported folders against the tables of vLLM and TensorRT-LLM."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.hf.__main__ import main
from train.hf.config import dbrx_from_model
from train.hf.serving import check_folder, slots
from train.recipe.reading import load_recipe
from train.recipe.schema import Model, Moe
from train.recipe.sizes import weights

MODEL = Model(
    d_model=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    ffn_hidden_size=40,
    vocab_size=256,
    max_sequence_tokens=64,
    clip_qkv=8,
    moe=Moe(experts=4, top_k=2),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({w.name: torch.zeros(w.shape) for w in weights(MODEL)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dbrx"} | dbrx_from_model(MODEL)))
    return tmp_path


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("engine", ["vllm", "vllm-2024"])
def test_vllm_is_filled(engine: str, degree: int, folder: Path) -> None:
    assert len(check_folder(folder, engine, degree)) == 3 + 2 * 7


@pytest.mark.parametrize("degree", [1, 2])
def test_tensorrt_llm_is_filled(degree: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = folder / "table.json"
    arguments = [str(folder), "--engine", "tensorrt-llm", "--tensor-parallel", str(degree)]
    assert main(["serving", *arguments, "--json", str(figures)]) == 0
    assert "17 parameters of tensorrt-llm filled" in capsys.readouterr().out
    assert len(json.loads(figures.read_text())) == 17


def test_published_dbrx_at_8_gpus() -> None:
    """Names and shapes of vLLM's modules for the real model, spelled out."""
    model = load_recipe(Path(__file__).parents[3] / "yamls" / "dbrx.yaml").model
    shapes = {slot.name: slot.shape for slot in slots("vllm", model, 8)}
    block = "transformer.blocks.39."
    assert shapes["transformer.wte.weight"] == (12544, 6144)
    assert shapes[f"{block}norm_attn_norm.attn.Wqkv.weight"] == (6 * 128 + 2 * 128, 6144)
    assert shapes[f"{block}norm_attn_norm.attn.out_proj.weight"] == (6144, 768)
    assert shapes[f"{block}ffn.router.layer.weight"] == (16, 6144)
    assert shapes[f"{block}ffn.experts.w13_weight"] == (16, 2 * 1344, 6144)
    assert shapes[f"{block}ffn.experts.w2_weight"] == (16, 6144, 1344)
    assert len(shapes) == 3 + 40 * 7


def _rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_faults_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w1 = "transformer.blocks.1.ffn.experts.mlp.w1"
    for name, tensor, words in (
        ("surplus", torch.zeros(3), "no place for surplus"),
        (w1, torch.zeros(159, 32), "do not fill transformer.blocks.1.ffn.experts.w13_weight"),
        (w1, None, f"needs {w1}, which is missing"),
    ):
        _rewrite(folder, name, tensor)
        assert main(["serving", str(folder)]) == 2
        assert words in capsys.readouterr().err
        _rewrite(folder, "surplus", None)


def test_what_the_engines_cannot_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serving", str(folder), "--tensor-parallel", "3"]) == 2
    assert "heads 8 is not divisible" in capsys.readouterr().err
    plain = replace(MODEL, moe=Moe(experts=4, top_k=2, normalize_weights_p=None))
    (folder / "config.json").write_text(json.dumps({"model_type": "dbrx"} | dbrx_from_model(plain)))
    assert main(["serving", str(folder)]) == 2
    assert "always divides the selected experts' weights by their sum" in capsys.readouterr().err
