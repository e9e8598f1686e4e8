"""No document ends a job, and no step takes time that grows faster than the document.

A step that took the square of a run's length would take minutes here, and all take seconds.
"""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data.text.bpe import train_bpe
from data.text.clean import normalise
from data.text.duplicates import resolve, sketch, sketch_without_words
from data.text.language import language_of
from data.text.quality import code_scores, prose_scores
from data.text.words import _hashes, hash_words
from data.tokenizer import LONGEST_PART, TokenizerHandle, open_tokenizer, split_for_encoding
from train.recipe.schema import Tokenizer, TokenizerKind

SMALL = Tokenizer(TokenizerKind.bpe, 300)
WORDS = ["a few words to learn from, a few words"] * 5
SIGNS = [
    " ",
    "\n",
    "\r\n",
    "\u00a0",
    "\t",
    "=",
    "a",
    "é",
    "7",
    "中",
    "한",
    "\u0301",
    "\u0301\u0316",
    "😀",
    "_",
    "\x00",
]
SIGNS += [" \n", "= ", "ACGT", "a\u200d", "' ", "\u2028"]
COUNT, FEWER = 1_200_000, 300_000
"""The regular expressions failed at a million; learning and sorting were quadratic long before."""


@pytest.fixture(scope="module")
def bpe() -> TokenizerHandle:
    return train_bpe(SMALL, iter(WORDS))


@pytest.fixture(scope="module")
def cl100k() -> TokenizerHandle:
    handle = open_tokenizer(Tokenizer(), Path("nowhere"))
    # Without the optional faster encoder, which has no trouble.
    handle._encode_batch = handle._encode_with_tiktoken
    return handle


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "cl100k"])
@pytest.mark.parametrize("sign", [" ", "\n", "=", "中", "\u0301", "a\u200d"])
def test_long_runs_are_encoded(kind: str, sign: str, request: pytest.FixtureRequest):
    handle: TokenizerHandle = request.getfixturevalue(kind)
    text = "x" + sign * (COUNT // len(sign)) + "y"
    (ids,) = handle.encode_documents([text])
    assert handle.decode(ids) == text


@pytest.mark.parametrize("sign", SIGNS)
def test_a_tokenizer_is_learnt_from_long_runs(sign: str):
    text = "x" + sign * (FEWER // len(sign)) + "y"
    train_bpe(SMALL, iter([*WORDS, text]))


def test_long_pieces_change_nothing_that_is_learnt_from_others() -> None:
    texts = [*WORDS, "=" * 79, " " * 100, "x" * 128]
    assert train_bpe(SMALL, iter(texts)).ranks == train_bpe(SMALL, iter(texts[::-1])).ranks


@pytest.mark.parametrize("kind", ["bpe", "cl100k"])
@pytest.mark.parametrize(
    "text", ["It's 1234567 o'clock, isn't it?\r\n\tdef f(x):  \n", "naïve中文 12x\u0301½ !!\n "]
)
def test_parts_have_the_ids_of_the_whole(
    kind: str, text: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle: TokenizerHandle = request.getfixturevalue(kind)
    (whole,) = handle._encode_with_tiktoken([text * 200])
    monkeypatch.setattr("data.tokenizer.LONGEST_PART", 50)
    assert len(split_for_encoding(text * 200)) > 20
    (parts,) = handle.encode_documents([text * 200])
    assert np.array_equal(parts, whole)


def test_short_texts_are_whole_and_long_runs_are_cut() -> None:
    assert split_for_encoding("") == [""] and split_for_encoding(" " * LONGEST_PART) == [" " * LONGEST_PART]
    parts = split_for_encoding("=" * (2 * LONGEST_PART + 1))
    assert [len(part) for part in parts] == [LONGEST_PART, LONGEST_PART, 1]


@pytest.mark.parametrize("sign", SIGNS)
def test_every_rule_reads_long_runs(sign: str):
    text = "x" + sign * (FEWER // len(sign)) + "y"
    text = normalise(text)
    for part in (text, text[:190_000]):
        code_scores(part)
        prose_scores(part, language_of(part))
    words = hash_words(text)
    sketch(words)
    assert max(map(len, _hashes), default=0) < 100, "a run is not kept among the frequent words"


def test_marks_are_put_in_order_as_unicode_says() -> None:
    for text in ("a\u0301\u0316 e\u0323\u0302", "a" + "\u0301\u0316" * 40, "\u1100\u1161\u11a8 né"):
        assert normalise(text) == unicodedata.normalize("NFC", text) + "\n"


def test_texts_without_words_are_copies_only_of_equal_ones() -> None:
    texts = ["====\n", "----\n", "=====\n", "====\n", "....\n"]
    digests = np.array([[hash(text) & 2**63 - 1, 7] for text in texts], np.uint64)
    found = resolve(digests, np.concatenate([sketch_without_words(text) for text in texts]), 0.8)
    assert found.keeper.tolist() == [0, 1, 2, 0, 4] and found.group.tolist() == [0, 1, 2, 0, 4]
