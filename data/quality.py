"""Which files are worth learning from: published heuristics, each with its source."""

import re

LONGEST_BYTES = 200_000
"""Larger files are tables and generated code more often than not."""

_GENERATED = re.compile(r"auto-?generated|generated (?:by|from|automatically)|do not (?:edit|modify)", re.I)
_LETTER = re.compile(r"[^\W\d_]")
_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "•", "+")


def is_good_code(text: str) -> bool:
    """Whether source code is written by hand and readable.

    Lines of at most 100 characters on average and 1000 at most, a quarter of letters and digits (Chen
    et al. 2021, "Evaluating Large Language Models Trained on Code", section 3.1); not made by a
    generator (as Lozhkov et al. 2024, "StarCoder 2 and The Stack v2").
    """
    if not 200 <= len(text) <= LONGEST_BYTES:
        return False
    lines = text.split("\n")
    if len(text) > 100 * len(lines) or max(map(len, lines)) > 1000:
        return False
    if is_generated(text):
        return False
    return 4 * sum(map(len, re.findall(r"[^\W_]+", text))) >= len(text)


def is_generated(text: str) -> bool:
    """Whether the beginning of a source file names a generator."""
    return _GENERATED.search(text[:1000]) is not None


def is_good_prose(text: str) -> bool:
    """Whether text is running text for people.

    The quality rules of Rae et al. 2021 ("Scaling Language Models: Gopher", section A.1.1): 50 to
    100,000 words of 3 to 10 characters on average, four of five with a letter, two of eight stop words,
    a hash or an ellipsis for at most one word in ten, at most nine of ten lines with a bullet and three
    of ten ending in an ellipsis.
    """
    if len(text) > LONGEST_BYTES:
        return False
    words = text.split()
    if not 50 <= len(words) <= 100_000 or not 3 <= sum(map(len, words)) / len(words) <= 10:
        return False
    if sum(1 for word in words if word[0].isalpha() or _LETTER.search(word)) < 0.8 * len(words):
        return False
    if len(_STOP_WORDS.intersection(words)) < 2:
        return False
    if text.count("#") + text.count("...") + text.count("…") > 0.1 * len(words):
        return False
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return False
    return sum(line.endswith(("...", "…")) for line in lines) <= 0.3 * len(lines)
