import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import tokenizer as module
from data.text.bpe import train_bpe
from data.text.hugging_face_form import read_form
from data.tokenizer import PROBES, RankTokenizer, TokenizerHandle, is_equal, open_tokenizer
from train.recipe.errors import UserError
from train.recipe.schema import Recipe, Tokenizer, TokenizerKind

SMALL = Tokenizer(TokenizerKind.bpe, 400)
HOME = Path(__file__).parents[2]


def texts() -> list[str]:
    """This project's sources, and the probes."""
    return [path.read_text() for path in sorted((HOME / "data").glob("*.py"))] + list(PROBES)


@pytest.fixture(scope="module")
def cl100k() -> TokenizerHandle:
    return open_tokenizer(Tokenizer(), Path("unused"))


@pytest.fixture(scope="module")
def bpe() -> TokenizerHandle:
    return train_bpe(SMALL, iter(texts()))


@pytest.fixture(params=["cl100k", "bpe"])
def handle(request: pytest.FixtureRequest) -> TokenizerHandle:
    return request.getfixturevalue(request.param)


def test_cl100k_equals_tiktoken(cl100k: TokenizerHandle):
    reference = tiktoken.get_encoding("cl100k_base")
    for text, ids in zip(texts(), cl100k.encode_documents(texts()), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode_ordinary(text)


def test_cl100k_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    damaged = tmp_path / module.CL100K_CACHE_NAME
    damaged.write_bytes(b"IQ== 0\n")
    module._offer_ranks_to_tiktoken()
    assert hashlib.sha256(damaged.read_bytes()).hexdigest() == module.CL100K_SHA256


def test_ids_of_dbrx(cl100k: TokenizerHandle):
    assert (cl100k.vocab_size, cl100k.eos_id, cl100k.pad_id) == (100_278, 100_257, 100_277)


def test_text_never_makes_a_special_token(handle: TokenizerHandle):
    text = f"a{module.EOS}b{module.PAD}<|fim_prefix|>"
    (ids,) = handle.encode_documents([text])
    assert not set(ids.tolist()) & set(handle.special_ids.values())
    assert handle.decode(ids) == text


def test_decoding_gives_the_text_back(handle: TokenizerHandle):
    for text, ids in zip(texts(), handle.encode_documents(texts()), strict=True):
        assert handle.decode(ids) == text


def test_ids_that_mean_nothing_decode_to_a_mark(cl100k: TokenizerHandle):
    assert cl100k.decode([64, 100_270, cl100k.eos_id, 100_351]) == "a\ufffd<|endoftext|>\ufffd"


@pytest.mark.slow
def test_hugging_face_form_is_equal(handle: TokenizerHandle, tmp_path: Path):
    from transformers import AutoTokenizer

    handle.to_hugging_face(tmp_path, max_length=2048)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (handle.eos_id, handle.pad_id)
    assert theirs.model_max_length == 2048 and len(theirs) <= handle.vocab_size
    for text, ids in zip(texts(), handle.encode_documents(texts()), strict=True):
        encoded = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert encoded == ids.tolist()
        assert theirs.decode(encoded) == text
    assert theirs("<|endoftext|>")["input_ids"] == [handle.eos_id]


def test_trained_tokenizer_is_read_back(bpe: TokenizerHandle, tmp_path: Path):
    bpe.to_hugging_face(tmp_path)
    again = open_tokenizer(SMALL, tmp_path)
    assert again.fingerprint == bpe.fingerprint and again.name == "bpe-400"
    assert read_form(tmp_path / "tokenizer.json") == (bpe.pattern, bpe.ranks, bpe.special_ids)
    with pytest.raises(UserError, match=r"vocab_size: is 399, but .* has 400 ids"):
        open_tokenizer(Tokenizer(TokenizerKind.bpe, 399), tmp_path)
    with pytest.raises(UserError, match="write_shards"):
        open_tokenizer(SMALL, tmp_path / "elsewhere")


def test_training_is_deterministic_and_fills_the_vocabulary(bpe: TokenizerHandle):
    assert train_bpe(SMALL, iter(texts())).fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 400 and bpe.eos_id == 398 and bpe.pad_id == 399
    # No more pairs occur twice: fewer tokens than requested.
    assert train_bpe(SMALL, iter(["abc abd"])).vocab_size < 270
    # All 256 bytes are tokens, so any text can be encoded.
    assert all(bytes([byte]) in bpe.ranks for byte in range(256))


def test_processes_forked_after_training_do_not_warn(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    train_bpe(SMALL, iter(texts()))
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "parallelism" not in capfd.readouterr().err


def test_fingerprint_tells_tokenizers_apart(bpe: TokenizerHandle, cl100k: TokenizerHandle):
    def altered(**changes: object) -> str:
        parts = {"pattern": bpe.pattern, "ranks": bpe.ranks, "special_ids": bpe.special_ids} | changes
        return RankTokenizer("bpe-400", **parts).fingerprint  # type: ignore[arg-type]

    swapped = dict(bpe.ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    prints = [
        bpe.fingerprint,
        cl100k.fingerprint,
        altered(ranks=swapped),
        altered(pattern=r"\S+|\s+"),
        altered(special_ids=bpe.special_ids | {"<|more|>": 400}),
    ]
    assert len(set(prints)) == len(prints)
    assert altered() == bpe.fingerprint


def test_a_fast_encoder_that_errs_is_not_used(bpe: TokenizerHandle):
    def wrong(batch: list[str]) -> list[module.Tokens]:
        return [ids[:-1] for ids in bpe.encode_documents(batch)]

    handle = RankTokenizer("bpe-400", bpe.pattern, bpe.ranks, bpe.special_ids, fast_encoder=wrong)
    assert is_equal(handle.encode_documents, bpe.encode_documents)
    assert not is_equal(wrong, bpe.encode_documents)


def test_shards_of_another_tokenizer_are_refused(built: Recipe, make_recipe: Callable[..., Recipe]):
    from data.loader import build_train_loader
    from data.opened import OpenedData

    opened = OpenedData(built)
    opened.tokenizer = train_bpe(built.tokenizer, iter(texts()))
    with pytest.raises(UserError, match=r"tokenizer: bpe-300 has fingerprint .* was made with .*--rebuild"):
        build_train_loader(opened, rank=0, world_size=1)


def test_a_checkout_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")  # Nothing can be made in it, not even by root.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(module, "CACHE_FOLDER", tmp_path / "file/.cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    module._offer_ranks_to_tiktoken()
    (folder,) = (tmp_path / "temporary").iterdir()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(folder)
    assert [file.name for file in folder.iterdir()] == [module.CL100K_CACHE_NAME]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file/given"))
    with pytest.raises(UserError, match=r"tokenizer.kind: .*given can't be written, .*; set TIKTOKEN"):
        module._offer_ranks_to_tiktoken()
