"""Quality scores of documents, and the published rules on them, each with its source.

A score is a number, or None where it means nothing for the text's language. So a threshold can be chosen once
all documents have their scores; a rule of :data:`PROSE` and :data:`CODE` is one that others have published.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.text.language import UNDETERMINED, UNSPACED

Scores = dict[str, float | None]

LONGEST_FILE = 200_000
"""Characters of a file of code or of the installed corpus; larger ones are mostly tables and generated."""

_GENERATED = re.compile(r"auto-?generated|generated (?:by|from|automatically)|do not (?:edit|modify)", re.I)
_LETTER = re.compile(r"[^\W\d_]")
_STOP_WORDS_OF_ENGLISH = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "•", "+")
_NGRAMS = (2, 3, 4)
_MANY_WORDS = 300
_CHARACTERS_OF_A_WORD = 2
"""Of Chinese and Japanese, on average."""


@dataclass(frozen=True)
class Rule:
    """Bounds of a score."""

    score: str
    reason: str
    """Of documents that are out of bounds."""
    at_least: float | None = None
    at_most: float | None = None

    def admits(self, value: float | None) -> bool:
        """Returns whether a score is within the bounds, in fp32, as scores are kept; None is."""
        if value is None:
            return True
        above = self.at_least is None or np.float32(value) >= np.float32(self.at_least)
        return bool(above and (self.at_most is None or np.float32(value) <= np.float32(self.at_most)))


PROSE_WORDS = (
    Rule("words", "prose: number of words", 50, 100_000),
    Rule("word_length", "prose: length of words", 3, 10),
    Rule("words_with_letters", "prose: words without letters", at_least=0.8),
    Rule("stop_words", "prose: stop words", at_least=2),
    Rule("symbols_per_word", "prose: symbols", at_most=0.1),
    Rule("bullet_lines", "prose: bullets", at_most=0.9),
    Rule("ellipsis_lines", "prose: ellipses", at_most=0.3),
)
"""The quality rules of Rae et al. 2021 ("Scaling Language Models: Gopher", section A.1.1)."""
PROSE_REPETITION = (
    Rule("repeated_lines", "prose: repeated lines", at_most=0.3),
    Rule("repeated_line_characters", "prose: repeated lines", at_most=0.2),
    *(
        Rule(f"most_frequent_{n}gram", f"prose: repeated {n}-grams", at_most=share)
        for n, share in ((2, 0.20), (3, 0.18), (4, 0.16))
    ),
)
"""Rae et al. 2021, table A1: the rules on lines and on the most frequent n-grams of words."""
PROSE = PROSE_WORDS + PROSE_REPETITION
CODE = (
    Rule("characters", "code: length", 200, LONGEST_FILE),
    Rule("mean_line", "code: long lines", at_most=100),
    Rule("longest_line", "code: long lines", at_most=1000),
    Rule("generated", "code: generated", at_most=0),
    Rule("letters_and_digits", "code: few letters", at_least=0.25),
)
"""Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 3.1; not generated, as in
Lozhkov et al. 2024, "StarCoder 2 and The Stack v2"."""


def first_violation(scores: Mapping[str, float | None], rules: Sequence[Rule]) -> str:
    """The reason of the first rule that scores violate; empty if none."""
    return next((rule.reason for rule in rules if not rule.admits(scores[rule.score])), "")


def is_good_code(text: str) -> bool:
    """Returns whether source code is hand-written and readable, by :data:`CODE`."""
    return 200 <= len(text) <= LONGEST_FILE and not first_violation(code_scores(text), CODE)


def is_good_prose(text: str) -> bool:
    """Returns whether text is English prose for human readers, of which a small corpus can hold several."""
    return len(text) <= LONGEST_FILE and not first_violation(word_scores(text, "en"), PROSE_WORDS)


def is_generated(text: str) -> bool:
    """Returns whether the beginning of a source file says that it is generated."""
    return _GENERATED.search(text[:1000]) is not None


def code_scores(text: str) -> Scores:
    """Scores of source code, for :data:`CODE`: lengths in characters, shares of them, and 1 for generated."""
    lines = text.split("\n")
    return {
        "characters": len(text),
        "mean_line": len(text) / len(lines),
        "longest_line": max(map(len, lines)),
        "generated": float(is_generated(text)),
        "letters_and_digits": sum(map(len, re.findall(r"[^\W_]+", text))) / max(len(text), 1),
    }


def prose_scores(text: str, language: str) -> Scores:
    """Scores of prose, for :data:`PROSE`; see :func:`word_scores` and :func:`repetition_scores`."""
    return word_scores(text, language) | repetition_scores(text)


def word_scores(text: str, language: str) -> Scores:
    """Scores of prose by its words and lines, for :data:`PROSE_WORDS`.

    Words, characters of a word, the share of words with a letter, how many of eight stop words occur, hashes
    and ellipses per word, the shares of lines that start with a bullet and that end in an ellipsis.

    The length of words and the stop words are scores for English and for text in no language. Where words
    have no blanks between them there are no scores of words, and symbols are counted per two characters.

    Args:
        text: the text.
        language: its language, as :mod:`data.text.language` tells it.
    """
    words = text.split()
    count = max(len(words), 1)
    is_english, is_spaced = language in (UNDETERMINED, "en"), language not in UNSPACED
    with_letters = sum(1 for word in words if word[0].isalpha() or _LETTER.search(word))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    symbols = text.count("#") + text.count("...") + text.count("…")
    units = count if is_spaced else max(len(text) // _CHARACTERS_OF_A_WORD, 1)
    return {
        "words": len(words) if is_spaced else None,
        "word_length": sum(map(len, words)) / count if is_english else None,
        "words_with_letters": with_letters / count if is_spaced else None,
        "stop_words": len(_STOP_WORDS_OF_ENGLISH.intersection(words)) if is_english else None,
        "symbols_per_word": symbols / units,
        "bullet_lines": sum(line.startswith(_BULLETS) for line in lines) / max(len(lines), 1),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / max(len(lines), 1),
    }


def repetition_scores(text: str) -> Scores:
    """Scores of what a text repeats, for :data:`PROSE_REPETITION`.

    The share of lines that occurred before, their share of the characters, and the share of the characters in
    the most frequent n-gram of words, if it occurs twice.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeated = [line for line, count in Counter(lines).items() for _ in range(count - 1)]
    scores: Scores = {
        "repeated_lines": len(repeated) / max(len(lines), 1),
        "repeated_line_characters": sum(map(len, repeated)) / max(len(text), 1),
    }
    words = text.split()
    covered = (_covered_of_many if len(words) > _MANY_WORDS else _covered)(words)
    return scores | {f"most_frequent_{n}gram": it / max(len(text), 1) for n, it in covered.items()}


def _covered(words: list[str]) -> dict[int, int]:
    """Characters of the most frequent n-gram, of all its occurrences if there are several, by n."""
    covered = {}
    for n in _NGRAMS:
        grams = Counter(zip(*(words[at:] for at in range(n)), strict=False))
        gram, count = grams.most_common(1)[0] if grams else ((), 0)
        covered[n] = count * sum(map(len, gram)) if count > 1 else 0
    return covered


def _covered_of_many(words: list[str]) -> dict[int, int]:
    """The same, faster from some hundreds of words on."""
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(word, len(number)) for word in words], np.int64)
    ends = np.r_[0, np.cumsum([len(word) for word in words])]
    codes, covered = ids, {}
    for n in _NGRAMS:
        # An n-gram is the n-1-gram that it begins with, and its last word.
        _, firsts, codes, counts = np.unique(
            codes[:-1] * len(number) + ids[n - 1 :],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        most = int(counts.max())
        first = firsts[counts == most].min()
        covered[n] = most * int(ends[first + n] - ends[first]) if most > 1 else 0
    return covered
