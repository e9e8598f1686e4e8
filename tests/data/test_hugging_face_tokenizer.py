"""Tokenizers from elsewhere against the libraries that they come from, and through preparation to shards."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.hugging_face_tokenizer import HuggingFaceTokenizer
from data.opened import OpenedData
from data.shards.manifest import check_shards, join_manifests, require_match
from data.text.installed import CorpusDocument
from data.tokenizer import PROBES, split_for_encoding
from data.write_shards import build_shards
from train.recipe.errors import UserError
from train.recipe.schema import Recipe, Tokenizer, TokenizerKind

from .conftest import small_documents

HOME = Path(__file__).parents[2]
LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "no prefix": LLAMA | {"add_dummy_prefix": False},
    "bpe": {"model_type": "bpe", "user_defined_symbols": ["<fim>"], "pad_id": 3},
    "unigram": {"model_type": "unigram"},
    "unigram of bytes": LLAMA | {"model_type": "unigram"},
}


def texts() -> list[str]:
    return [*PROBES, *(path.read_text() for path in sorted((HOME / "data").glob("*.py")))]


def sentence_piece(folder: Path, **options: Any) -> Path:
    """Trains a small SentencePiece model."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(exist_ok=True)
    (folder / "text").write_text("\n".join(texts()))
    place: dict[str, Any] = {"input": str(folder / "text"), "model_prefix": str(folder / "tokenizer")}
    SentencePieceTrainer.train(minloglevel=2, vocab_size=600, **place, **options)
    (folder / "text").unlink()
    return folder / "tokenizer.model"


def byte_level(folder: Path, **config: object) -> Path:
    """Writes a folder as GPT-2's: a byte-level BPE with two special tokens."""
    from tokenizers import Tokenizer as Form
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Form(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|end|>", "<|fim|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"} | config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sentence_piece_model_gives_its_ids(kind: str, tmp_path: Path):
    from sentencepiece import SentencePieceProcessor

    file = sentence_piece(tmp_path / "model", **KINDS[kind])
    theirs = SentencePieceProcessor(model_file=str(file))
    handle = HuggingFaceTokenizer(file)
    for text, ids in zip(texts(), handle.encode_documents(texts()), strict=True):
        assert ids.tolist() == theirs.encode(text)
    assert (handle.vocab_size, handle.eos_id, handle.bos_id) == (600, theirs.eos_id(), theirs.bos_id())
    assert handle.pad_id == (theirs.pad_id() if theirs.pad_id() >= 0 else theirs.eos_id())
    if "normalization_rule_name" in KINDS[kind]:
        assert [handle.decode(ids) for ids in handle.encode_documents(list(PROBES))] == list(PROBES)
    # What the shards keep is the same tokenizer, also to transformers.
    handle.to_hugging_face(tmp_path / "kept")
    again = HuggingFaceTokenizer(tmp_path / "kept")
    assert again.fingerprint == handle.fingerprint and again.eos_id == handle.eos_id
    assert (tmp_path / "kept/tokenizer.model").read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_folder_gives_the_ids_that_transformers_gives(tmp_path: Path):
    from transformers import AutoTokenizer

    handle = HuggingFaceTokenizer(byte_level(tmp_path / "gpt", tokenizer_class="PreTrainedTokenizerFast"))
    handle.to_hugging_face(tmp_path / "kept")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "kept", local_files_only=True)
    for text, ids in zip(texts(), handle.encode_documents(texts()), strict=True):
        assert ids.tolist() == theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert handle.decode(ids) == text
    (ids,) = handle.encode_documents(["a<|end|>b<|fim|>"])
    assert not set(ids.tolist()) & set(handle.special_ids.values())
    assert theirs.eos_token_id == handle.eos_id == handle.pad_id == handle.bos_id == 0


def test_long_texts_are_encoded_in_parts_only_if_that_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = "It's 1234567 o'clock, isn't it?\n\tdef f(x):  \n" * 40
    handles = [
        HuggingFaceTokenizer(byte_level(tmp_path / "gpt")),
        HuggingFaceTokenizer(sentence_piece(tmp_path / "model", **LLAMA)),
    ]
    whole = [handle.encode_documents([text])[0].tolist() for handle in handles]
    monkeypatch.setattr("data.tokenizer.LONGEST_PART", 50)
    assert len(split_for_encoding(text)) > 20
    assert [handle.encode_documents([text])[0].tolist() for handle in handles] == whole
    # A space before every part would be another text.
    handles[1]._parts_are_whole = True
    assert handles[1].encode_documents([text])[0].tolist() != whole[1]


def test_what_cannot_be_read_is_one_line(tmp_path: Path):
    folder = byte_level(tmp_path / "gpt")
    with pytest.raises(UserError, match=r"tokenizer.eos_token: .*tokenizer.json has no token '</s>'"):
        HuggingFaceTokenizer(folder, "</s>")
    assert HuggingFaceTokenizer(folder, "<|fim|>").eos_id == 1
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.eos_token: nothing with .* names an eos_token"):
        HuggingFaceTokenizer(folder)
    (folder / "config.json").write_text('{"eos_token_id": [1, 0]}')
    assert HuggingFaceTokenizer(folder / "tokenizer.json").eos_id == 1
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.path: .*tokenizer.json can't be read"):
        HuggingFaceTokenizer(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.path: .*tokenizer.model is no SentencePiece model"):
        HuggingFaceTokenizer(folder)
    with pytest.raises(UserError, match=r"tokenizer.path: .* has neither tokenizer.json nor"):
        HuggingFaceTokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.path: no .*nowhere"):
        HuggingFaceTokenizer(tmp_path / "nowhere")
    words = sentence_piece(tmp_path / "words", model_type="word")
    with pytest.raises(UserError, match=r"of characters or words, which is not converted"):
        HuggingFaceTokenizer(words)


def with_tokenizer(recipe: Recipe, kind: TokenizerKind, **changes: Any) -> Recipe:
    model = dataclasses.replace(recipe.model, vocab_size=400)
    return dataclasses.replace(recipe, model=model, tokenizer=Tokenizer(kind, **changes))


def test_shards_are_made_with_any_tokenizer_and_keep_it(tmp_path: Path, make_recipe: Callable[..., Recipe]):
    folder = byte_level(tmp_path / "gpt")
    recipe = with_tokenizer(make_recipe(tmp_path / "shards"), TokenizerKind.hf, path=str(folder))
    manifest = build_shards(recipe, documents=small_documents)
    assert check_shards(tmp_path / "shards") == manifest
    wanted = HuggingFaceTokenizer(folder)
    assert manifest.tokenizer.fingerprint == wanted.fingerprint and manifest.tokenizer.name == "hf"
    assert set(manifest.tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}
    opened = OpenedData(recipe)
    opened.require_match()
    folder_of = opened.shards("prose", "train")
    ids = np.concatenate([folder_of[n].tokens for n in range(len(folder_of))])
    assert wanted.decode(ids).startswith("prose ")
    split = manifest.domains["prose"].splits["train"]
    assert (ids == wanted.eos_id).sum() == split.documents + split.padding_tokens
    # A model with fewer rows, another tokenizer at the path, and altered files are refused.
    small = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=300))
    with pytest.raises(UserError, match=r"model.vocab_size: 300 rows, but the tokenizer makes ids up to 399"):
        require_match(manifest, small)
    with pytest.raises(UserError, match=r"model.vocab_size: 300 rows"):
        build_shards(small, documents=small_documents, rebuild=True)
    byte_level(folder, eos_token="<|fim|>")
    with pytest.raises(UserError, match=r"tokenizer.path: .*gpt is not the tokenizer that made"):
        OpenedData(recipe).require_match()
    shutil.rmtree(folder)  # The shards have their own copy.
    OpenedData(recipe).require_match()
    OpenedData(with_tokenizer(recipe, TokenizerKind.hf)).require_match()
    (tmp_path / "shards/tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config.json is altered"):
        check_shards(tmp_path / "shards")
    with pytest.raises(UserError, match=r"tokenizer.path: is null, so there is no tokenizer"):
        build_shards(with_tokenizer(recipe, TokenizerKind.hf), documents=small_documents, rebuild=True)


def test_a_trained_tokenizer_is_used_again_for_another_domain(
    built: Recipe, tmp_path: Path, make_recipe: Callable[..., Recipe]
):
    more = make_recipe(tmp_path / "more", domains={"web": 1.0})
    more = with_tokenizer(more, TokenizerKind.bpe, vocab_size=300, path=built.data.shards)
    documents = [
        CorpusDocument("web", f"{n}", f"quite other words, by number {n} zyx\n" * 20) for n in range(40)
    ]
    added = build_shards(more, documents=lambda: iter(documents))
    first = OpenedData(built).manifest
    assert added.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert set(join_manifests(added, first).domains) == {"code", "prose", "web"}
    trained_anew = with_tokenizer(
        make_recipe(tmp_path / "new", domains={"web": 1.0}), TokenizerKind.bpe, vocab_size=300
    )
    with pytest.raises(UserError, match="tokenizer"):
        join_manifests(build_shards(trained_anew, documents=lambda: iter(documents)), first)
    with pytest.raises(UserError, match=r"tokenizer.vocab_size: is 280, but .* has 300 ids"):
        build_shards(
            with_tokenizer(more, TokenizerKind.bpe, vocab_size=280, path=built.data.shards),
            documents=lambda: iter(documents),
            rebuild=True,
        )
    foreign = byte_level(tmp_path / "gpt")
    with pytest.raises(
        UserError, match=r"is not a BPE that data.write_shards trained; set tokenizer.kind to hf"
    ):
        build_shards(
            with_tokenizer(more, TokenizerKind.bpe, vocab_size=500, path=str(foreign)),
            documents=lambda: iter(documents),
            rebuild=True,
        )
