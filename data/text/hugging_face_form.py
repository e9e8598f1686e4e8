"""A rank table as Hugging Face's ``tokenizer.json``, and back.

tiktoken joins the two neighbours whose concatenation has the lowest rank; Hugging Face joins the first
pair on a list of merges. They agree if every way to cut a token in two tokens is on the list, in the
order of the tokens' ranks.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

UNUSED = "<|unused_"
"""Beginning of the names of ids that no token has."""


def write_form(
    folder: Path,
    pattern: str,
    ranks: Mapping[bytes, int],
    special_ids: Mapping[str, int],
    *,
    eos: str,
    pad: str,
) -> None:
    """Writes ``folder/tokenizer.json``.

    Args:
        folder: made where missing.
        pattern: tiktoken's expression for pieces.
        ranks: byte strings with their ids.
        special_ids: special tokens with their ids.
        eos: the end-of-text token, one of ``special_ids``.
        pad: the padding token, one of ``special_ids``.
    """
    assert eos in special_ids and pad in special_ids and max(ranks.values()) == len(ranks) - 1
    # Hugging Face numbers added tokens without gaps, so that gaps are filled with tokens of no use.
    name_of = {special_ids[name]: name for name in special_ids}
    added = [
        (number, name_of.get(number, f"{UNUSED}{number}|>"))
        for number in range(len(ranks), max(special_ids.values()) + 1)
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cut = {
        "type": "Split",
        "pattern": {"Regex": _for_oniguruma(pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    ordered = sorted(ranks, key=lambda token: ranks[token])
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for number, name in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, to_letters]},
        "post_processor": None,
        "decoder": {**to_letters, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A piece that is a token stays whole, as in tiktoken.
            "ignore_merges": True,
            "vocab": {_to_letters(token): ranks[token] for token in ordered},
            "merges": [
                [_to_letters(token[:cut_at]), _to_letters(token[cut_at:])]
                for token in ordered
                for cut_at in range(1, len(token))
                if token[:cut_at] in ranks and token[cut_at:] in ranks
            ],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False, indent=None), "utf-8")


def read_form(path: Path) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Pattern, ranks and special tokens of a file that :func:`write_form` wrote."""
    tree = json.loads(path.read_text("utf-8"))
    pattern = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    ranks = {from_letters(letters): rank for letters, rank in tree["model"]["vocab"].items()}
    added = {token["content"]: token["id"] for token in tree["added_tokens"]}
    return pattern, ranks, {name: number for name, number in added.items() if not name.startswith(UNUSED)}


def from_letters(letters: str) -> bytes:
    """The bytes behind a token in byte-level spelling."""
    return bytes(_byte_of_letter()[letter] for letter in letters)


def _to_letters(token: bytes) -> str:
    return "".join(_letters()[byte] for byte in token)


@lru_cache(maxsize=1)
def _letters() -> list[str]:
    """The letter that stands for each byte: itself if it prints, else one from U+0100 on."""
    letters: list[str] = []
    for byte in range(256):
        prints = chr(byte).isprintable() and chr(byte) != " "
        letters.append(chr(byte) if prints else chr(256 + len([a for a in letters if ord(a) >= 256])))
    return letters


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(_letters())}


def _for_oniguruma(pattern: str) -> str:
    """Spells tiktoken's pattern in the dialect of Hugging Face's engine.

    Possessive quantifiers only save time there, and `{1,3}+` would mean something else; `$` is the end
    of the text in tiktoken, but of a line here.
    """
    return re.sub(r"(?<=[+*?])\+|(?<=[0-9]\})\+", "", pattern).replace("$", r"\z")
