"""Quality filters for documents: published heuristics, each with its source."""

import re
from collections import Counter

from data.text.language import UNDETERMINED, UNSPACED, language_of

LONGEST_FILE = 200_000
"""Characters of a file of code or of the installed corpus; larger ones are mostly tables and generated."""

_GENERATED = re.compile(r"auto-?generated|generated (?:by|from|automatically)|do not (?:edit|modify)", re.I)
_LETTER = re.compile(r"[^\W\d_]")
_STOP_WORDS_OF_ENGLISH = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "•", "+")
_CHARACTERS_OF_A_WORD = 2
"""Of Chinese and Japanese, on average."""


def is_good_code(text: str) -> bool:
    """Returns whether source code is hand-written and readable, see :func:`code_violation`."""
    return not code_violation(text)


def is_good_prose(text: str) -> bool:
    """Returns whether text is English prose for human readers, of which a small corpus can hold several."""
    return len(text) <= LONGEST_FILE and not _words_violation(text.split()) and not prose_violation(text)


def code_violation(text: str) -> str:
    """The first rule that source code violates; empty if none.

    Lines average at most 100 characters and have at most 1000; at least a quarter of all characters are
    letters and digits (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 3.1);
    not generated (as in Lozhkov et al. 2024, "StarCoder 2 and The Stack v2").
    """
    if not 200 <= len(text) <= LONGEST_FILE:
        return "code: length"
    lines = text.split("\n")
    if len(text) > 100 * len(lines) or max(map(len, lines)) > 1000:
        return "code: long lines"
    if is_generated(text):
        return "code: generated"
    return "" if 4 * sum(map(len, re.findall(r"[^\W_]+", text))) >= len(text) else "code: few letters"


def is_generated(text: str) -> bool:
    """Returns whether the beginning of a source file says that it is generated."""
    return _GENERATED.search(text[:1000]) is not None


def prose_violation(text: str) -> str:
    """The first rule that prose violates; empty if none.

    The quality rules of Rae et al. 2021 ("Scaling Language Models: Gopher", section A.1.1): 50 to 100,000
    words of 3 to 10 characters on average, at least 80% of them with a letter, at least two of eight stop
    words, at most one hash or ellipsis per ten words, at most 90% of lines starting with a bullet and 30%
    ending in an ellipsis.

    The length of words and the stop words are rules for English. Text in another language that
    :mod:`data.text.language` recognises is text by that; where words have no blanks between them, no rule on
    words applies.
    """
    words = text.split()
    count = len(words)
    if reason := _words_violation(words):
        language = language_of(text)
        if language in UNSPACED:
            count = len(text) // _CHARACTERS_OF_A_WORD
        elif language in (UNDETERMINED, "en") or (reason := _words_violation(words, is_english=False)):
            return reason
    if text.count("#") + text.count("...") + text.count("…") > 0.1 * count:
        return "prose: symbols"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "prose: bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "prose: ellipses"
    return ""


def repetition_violation(text: str) -> str:
    """The first rule on repetition that prose violates; empty if none.

    Rae et al. 2021, table A1, the rules on lines and on the most frequent n-grams: at most 30% of the lines,
    with at most 20% of the characters, are repeated; the most frequent 2-gram of words covers at most 20% of
    the characters, 3-gram 18%, 4-gram 16%.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeated = [line for line, count in Counter(lines).items() for _ in range(count - 1)]
    if len(repeated) > 0.3 * len(lines) or sum(map(len, repeated)) > 0.2 * len(text):
        return "prose: repeated lines"
    words = text.split()
    for n, share in ((2, 0.20), (3, 0.18), (4, 0.16)):
        grams = Counter(zip(*(words[at:] for at in range(n)), strict=False))
        if grams:
            gram, count = grams.most_common(1)[0]
            if count > 1 and count * sum(map(len, gram)) > share * len(text):
                return f"prose: repeated {n}-grams"
    return ""


def _words_violation(words: list[str], *, is_english: bool = True) -> str:
    if not 50 <= len(words) <= 100_000:
        return "prose: number of words"
    if is_english and not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "prose: length of words"
    if sum(1 for word in words if word[0].isalpha() or _LETTER.search(word)) < 0.8 * len(words):
        return "prose: words without letters"
    has_stop_words = not is_english or len(_STOP_WORDS_OF_ENGLISH.intersection(words)) >= 2
    return "" if has_stop_words else "prose: stop words"
