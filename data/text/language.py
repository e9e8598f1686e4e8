"""Language identification by script and frequent function words.

Grefenstette 1995, "Comparing two language identification schemes" (JADT): the share of a language's function
words distinguishes European languages given a few dozen words. Languages with their own script are identified
by it. Text that matches none is ``und``, ISO 639-2's code for undetermined.
"""

import re
import unicodedata
from collections import Counter

UNDETERMINED = "und"
SAMPLE_CHARACTERS = 4000
"""Characters examined at the beginning of a text; more does not change the result."""
_LEAST_SHARE = 0.08
"""Minimum share of the language's function words among all words; running text has 0.2 to 0.5."""

FUNCTION_WORDS = {
    "en": "the of and to in is that for it with as was on are this be by from or have not which",
    "de": "der die und das den von zu mit sich des auf für ist im dem nicht ein eine als auch es wird",
    "fr": "le la les de des et un une du que est pour qui dans en sur pas par il au plus ce avec",
    "es": "el la los las de y que en un una del por con se para es no al lo como más su",
    "it": "il la di che e un una del della per non è in con si le dei da gli alla sono più",
    "pt": "o a os as de e que do da em um uma para com não no na por se dos mais é",
    "nl": "de het een en van in is dat op te zijn met voor niet aan er ook die om als bij",
    "sv": "och att det som en på är av för med den till inte har om ett de jag var från",
    "da": "og at det som en på er af for med den til ikke har om et de jeg var fra",
    "pl": "i w na z się nie do jest że o jak to po ale od przez dla są oraz które",
    "cs": "a se v na je že s z do o to i jako pro by ale jsou nebo podle který",
    "fi": "ja on ei se että oli hän mutta myös kun ovat joka tai niin vain sen ole",
    "tr": "ve bir bu da de için ile olarak çok daha gibi en olan kadar ne ama sonra",
}
_LANGUAGES_OF = {word: [] for words in FUNCTION_WORDS.values() for word in words.split()}  # type: dict[str, list[str]]
for _code, _words in FUNCTION_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF[_word].append(_code)

SCRIPTS = {
    "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CJK": "zh", "CYRILLIC": "ru", "ARABIC": "ar",
    "GREEK": "el", "HEBREW": "he", "THAI": "th", "DEVANAGARI": "hi", "BENGALI": "bn", "TAMIL": "ta",
    "GEORGIAN": "ka", "ARMENIAN": "hy",
}  # fmt: skip
LANGUAGES = frozenset(FUNCTION_WORDS) | frozenset(SCRIPTS.values())
UNSPACED = frozenset({"ja", "zh", "th"})
"""Languages that write words without blanks between them."""


def language_of(text: str) -> str:
    """Returns the ISO 639-1 code of a text's language, or ``und``.

    A script counts as its language with the most speakers, for example Cyrillic as ``ru``.
    """
    sample = text[:SAMPLE_CHARACTERS].lower()
    letters = [character for character in sample if character.isalpha()]
    if not letters:
        return UNDETERMINED
    foreign = [character for character in letters[::5] if not character.isascii()]
    if len(foreign) > 0.4 * len(letters[::5]):
        scripts = Counter(unicodedata.name(character, "?").split()[0] for character in foreign)
        # Japanese text also contains Chinese characters.
        if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * len(foreign):
            return "ja"
        script = min(scripts, key=lambda name: (-scripts[name], name))
        if script in SCRIPTS:
            return SCRIPTS[script]
    words = re.findall(r"[^\W\d_]+", sample)
    votes = Counter(code for word in words for code in _LANGUAGES_OF.get(word, ()))
    best = min(votes, key=lambda code: (-votes[code], code), default=UNDETERMINED)
    return best if votes[best] >= max(2, _LEAST_SHARE * len(words)) else UNDETERMINED
