"""Converts a rank table to Hugging Face's ``tokenizer.json``, and back.

tiktoken merges the two neighbours whose concatenation has the lowest rank; Hugging Face merges the first pair
on a list of merges. They agree if the list has every split of a token into two tokens, in the order of the
tokens' ranks. ``transformers.convert_slow_tokenizer.TikTokenConverter`` makes the same list, but it imports
torch, which data preparation does not need, and does not support unused ids.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

Encoder = Callable[[list[str]], list[Any]]
"""Gives an array of ids for each text."""

UNUSED = "<|unused_"
"""Name prefix of unused ids."""


def write_form(path: Path, pattern: str, ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> None:
    """Writes a ``tokenizer.json``.

    Args:
        path: the file.
        pattern: tiktoken's regular expression for pieces.
        ranks: byte strings with their ids, 0 to their number - 1.
        special_ids: special tokens with their ids, all above those of the ranks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    assert max(ranks.values()) == len(ranks) - 1
    ordered = sorted(ranks, key=lambda token: ranks[token])
    merges = [
        (_to_letters(token[:cut]), _to_letters(token[cut:]))
        for token in ordered
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = spelled({token: ranks[token] for token in ordered})
    # As in tiktoken, a piece that is itself a token is not split.
    form = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    form.pre_tokenizer = byte_level_pieces(_for_oniguruma(pattern))
    form.decoder = decoders.ByteLevel()
    # Added tokens are numbered without gaps, so gaps are filled with unused tokens.
    name_of = {number: name for name, number in special_ids.items()}
    numbers = range(len(ranks), max(special_ids.values()) + 1)
    names = [name_of.get(number, f"{UNUSED}{number}|>") for number in numbers]
    form.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    form.save(str(path), pretty=False)


def read_form(path: Path) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Reads pattern, ranks and special tokens from a file of :func:`write_form`."""
    tree = json.loads(path.read_text("utf-8"))
    pattern = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    ranks = {from_letters(letters): rank for letters, rank in tree["model"]["vocab"].items()}
    added = {token["content"]: token["id"] for token in tree["added_tokens"]}
    return pattern, ranks, {name: number for name, number in added.items() if not name.startswith(UNUSED)}


def difference(theirs: "Tokenizer", tokens: Mapping[str, int], encode: Encoder, texts: Sequence[str]) -> str:
    """Returns how a tokenizer differs from another, to follow its name; empty: not at all.

    Args:
        theirs: one of any origin, which leaves special tokens in texts as text.
        tokens: the other's tokens, spelled as ``theirs`` spells them, with their ids.
        encode: the other's encoder, without special tokens.
        texts: texts on which tokenizers tend to differ.
    """
    for letters, number in sorted(tokens.items(), key=lambda item: item[1]):
        found = theirs.id_to_token(number)
        if found != letters:
            return f"has {found!r} as id {number} instead of {letters!r}"
    for text, ids in zip(texts, encode(list(texts)), strict=True):
        if theirs.encode(text, add_special_tokens=False).ids != ids.tolist():
            return f"splits {text[:40]!r} in another way"
    return ""


def spelled(ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Returns byte strings in byte-level spelling, with their ids."""
    return {_to_letters(token): rank for token, rank in ranks.items()}


def byte_level_pieces(pattern: str) -> "PreTokenizer":
    """Returns a pre-tokenizer that splits text by a pattern and spells the pieces byte by byte."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def from_letters(letters: str) -> bytes:
    """Returns the bytes of a token in byte-level spelling."""
    return bytes(_byte_of_letter()[letter] for letter in letters)


def _to_letters(token: bytes) -> str:
    return "".join(_letters()[byte] for byte in token)


@lru_cache(maxsize=1)
def _letters() -> list[str]:
    """The letter that represents each byte: itself if printable, else one from U+0100 on."""
    letters: list[str] = []
    for byte in range(256):
        prints = chr(byte).isprintable() and chr(byte) != " "
        letters.append(chr(byte) if prints else chr(256 + len([a for a in letters if ord(a) >= 256])))
    return letters


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(_letters())}


def _for_oniguruma(pattern: str) -> str:
    """Translates tiktoken's pattern for Hugging Face's regex engine.

    Possessive quantifiers are removed: in tiktoken they only save time, and `{1,3}+` would mean something
    else here. `$` means the end of the text in tiktoken, but the end of a line here.
    """
    return re.sub(r"(?<=[+*?])\+|(?<=[0-9]\})\+", "", pattern).replace("$", r"\z")
