"""Continued pretraining of a Hugging Face folder with its own tokenizer, from its text to its export."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.hf.__main__ import main
from train.hf.folders import model_at
from train.recipe.errors import UserError
from train.recipe.schema import Recipe, Start, Tokenizer, TokenizerKind
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow


def _mixtral(folder: Path) -> None:
    """A tiny Mixtral with a SentencePiece tokenizer, as published ones have."""
    import transformers
    from sentencepiece import SentencePieceTrainer

    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def test_a_mixtral_is_trained_on_with_its_own_tokenizer(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train.run import run

    theirs, out = tmp_path / "mixtral", tmp_path / "out"
    _mixtral(theirs)
    assert main(["import", str(theirs), str(tmp_path / "ours")]) == 0
    weights = Start(weights=str(tmp_path / "ours"))

    def recipe_of(name: str, tokenizer: Tokenizer) -> Recipe:
        options = ("training.duration_tokens=2048", "data.corpus_bytes=200000")
        made = tiny_recipe(tmp_path, tmp_path / f"shards-{name}", name, *options)
        return replace(made, model=model_at(tmp_path / "ours")[0], tokenizer=tokenizer, start=weights)

    recipe = recipe_of("own", Tokenizer(TokenizerKind.hf, path=str(theirs)))
    assert run(recipe, Topology()) == 0
    assert main(["export", str(tmp_path / "own"), str(out)]) == 0
    original = SentencePieceProcessor(model_file=str(theirs / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    for text in ("def run(self): return 'Straße 12'", "  two  spaces\n"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == original.encode(text)
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert (trained.config.bos_token_id, trained.config.eos_token_id) == (1, 2) == (1, tokenizer.eos_token_id)
    assert "fingerprint" in (out / "README.md").read_text()
    assert not torch.equal(
        trained.lm_head.weight,
        AutoModelForCausalLM.from_pretrained(theirs).lm_head.weight,
    )
    # Another tokenizer is refused, before it is trained with and after.
    other = recipe_of("other", Tokenizer(TokenizerKind.bpe, 512))
    with pytest.raises(UserError, match=r"bpe-\d+ is not the tokenizer that the weights were trained with"):
        run(other, Topology())
    swapped = json.loads((tmp_path / "shards-own/tokenizer.json").read_text())
    swapped["added_tokens"].pop()
    (tmp_path / "shards-own/tokenizer.json").write_text(json.dumps(swapped))
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "again")]) == 2
