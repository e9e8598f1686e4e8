"""Exported folders load offline in transformers and compute the same as our decoder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from data.tokenizer import open_tokenizer
from train.hf.__main__ import main
from train.hf.architectures import family_for
from train.hf.check import NEWER_MODELS, SMALL_MODELS
from train.model.decoder import Decoder
from train.recipe.reading import load_recipe
from train.recipe.schema import (
    Balance,
    Model,
    Moe,
    Norm,
    Position,
    Recipe,
    Score,
    Tokenizer,
    TokenizerKind,
)

pytestmark = pytest.mark.slow

MakeRun = Callable[[Recipe], tuple[Path, Decoder]]

MODELS = SMALL_MODELS | NEWER_MODELS
# 300 ids are those of the tokenizer; clipped so low, most of what is clipped is changed.
DBRX = replace(MODELS["DBRX"], vocab_size=300, clip_qkv=0.1)
DOTS1 = replace(MODELS["dots.llm1"], vocab_size=300)
EXPORTED = {
    kind: replace(MODELS[kind], vocab_size=300)
    for kind in (
        "DBRX, weights not normalised",
        "DBRX of one expert (dense), tied",
        "LLaMA",
        "Mixtral",
        "MPT",
        "OLMoE",
        "Qwen3-MoE, dense layers",
    )
}
EXPORTED |= {
    "DBRX": DBRX,
    "LLaMA, tied": replace(EXPORTED["LLaMA"], tie_embeddings=True),
    "Mixtral, without its multi-token prediction": replace(EXPORTED["Mixtral"], mtp=True),
    "OLMoE, normalised and clipped": replace(EXPORTED["OLMoE"], moe=EXPORTED["Mixtral"].moe, clip_qkv=0.5),
    "dots.llm1": DOTS1,
}


def recipe_of(model: Model, shards: Path) -> Recipe:
    recipe = load_recipe(Path(__file__).parents[3] / "yamls" / "smoke.yaml")
    return replace(
        recipe,
        name="small",
        model=model,
        data=replace(recipe.data, shards=str(shards)),
        tokenizer=Tokenizer(kind=TokenizerKind.bpe, vocab_size=model.vocab_size),
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", EXPORTED)
def test_transformers_computes_the_same(
    kind: str, tokenizer_folder: Path, tmp_path: Path, make_run: MakeRun
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = EXPORTED[kind]
    architecture = family_for(replace(model, mtp=False)).architecture
    if not hasattr(transformers, architecture):
        pytest.skip(f"this transformers has no {architecture}")
    run, decoder = make_run(recipe_of(model, tokenizer_folder))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == architecture and theirs.dtype is torch.float32
    torch.manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (2, 24))
    with torch.no_grad():
        ours = decoder(ids).logits_BSV
        assert ours is not None
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=1e-5)
        assert ours.std() > 1e-2, "logits this small would agree whatever the weights"
        text = ids[:1]
        for _ in range(8):
            logits = decoder(text).logits_BSV
            assert logits is not None
            text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    said = theirs.generate(ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert said.tolist() == text.tolist()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    handle = open_tokenizer(Tokenizer(TokenizerKind.bpe, 300), tokenizer_folder)
    sample = "def export(checkpoint): return 'Straße'"
    np.testing.assert_array_equal(tokenizer(sample)["input_ids"], handle.encode_documents([sample])[0])
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == handle.eos_id
    theirs.generate(**tokenizer(sample, return_tensors="pt"), max_new_tokens=1, do_sample=False)


def test_a_balancing_bias_stays_fp32(tokenizer_folder: Path, tmp_path: Path, make_run: MakeRun) -> None:
    run, decoder = make_run(recipe_of(DOTS1, tokenizer_folder))
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as stored:
        bias_E = stored.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert stored.get_tensor("model.layers.1.mlp.gate.weight").dtype is torch.bfloat16
    assert torch.equal(bias_E, decoder.get_buffer("transformer.blocks.1.ffn.router.expert_bias"))


def test_shards_index_and_dtype(tokenizer_folder: Path, tmp_path: Path, make_run: MakeRun) -> None:
    run, decoder = make_run(recipe_of(DBRX, tokenizer_folder))
    arguments = ["--shard-gb", "2e-5", "--dtype", "bf16", "--json", str(tmp_path / "figures.json")]
    assert (
        main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "batch-00000007", *arguments]) == 0
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    state = decoder.state_dict()
    assert index["weight_map"].keys() == state.keys()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and json.loads((tmp_path / "figures.json").read_text())["files"].keys() == set(
        files
    )
    for file in files:
        size = (tmp_path / "out" / file).stat().st_size
        with safe_open(tmp_path / "out" / file, "pt") as stored:
            names = list(stored.keys())
            assert size < 2e-5 * 1e9 + 2000 or len(names) == 1
            for name in names:
                assert index["weight_map"][name] == file
                assert torch.equal(stored.get_tensor(name), state[name].bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    card = (tmp_path / "out/README.md").read_text()
    assert "448 tokens" in card and "16 experts, 4 per token" in card


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(DBRX, norm=Norm.rmsnorm, clip_qkv=8.0), "llama needs model.clip_qkv=null"),
        (replace(DBRX, qk_norm=True), "dbrx needs model.qk_norm=false"),
        (replace(DBRX, position=Position.alibi), "dbrx needs model.position=rope"),
        *(
            (replace(DBRX, moe=Moe(experts=4, top_k=2, **{key: value})), words)
            for key, value, words in (
                ("balance", Balance.bias, "dbrx needs model.moe.balance=loss"),
                ("score", Score.sigmoid, "dbrx needs model.moe.score=softmax"),
                ("weight_scale", 2.5, "dbrx needs model.moe.weight_scale=1"),
                ("groups", 2, "dbrx needs model.moe.top_groups=groups"),
                ("shared_hidden_size", 16, "dbrx needs model.moe.shared_hidden_size=null"),
                ("forced_balance", True, "forced balance"),
            )
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_a_line(
    model: Model,
    words: str,
    tokenizer_folder: Path,
    make_run: MakeRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = make_run(recipe_of(model, tokenizer_folder))
    assert main(["export", str(run), str(run / "out")]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("export: ") and words in complaint
    assert not (run / "out").exists()


def test_nan_is_refused_and_leaves_no_file(tokenizer_folder: Path, tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run(recipe_of(DBRX, tokenizer_folder))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    exported = tmp_path / "out" / "model.safetensors"
    content = bytearray(exported.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"
    exported.write_bytes(content)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert not list((tmp_path / "again").glob("*.safetensors*"))
