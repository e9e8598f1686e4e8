"""Language identification by py3langid, whose model of 139 languages comes with the package.

Naive Bayes over the byte n-grams that tell languages apart, whatever the domain (Lui and Baldwin 2011,
"Cross-domain Feature Selection for Language Identification", IJCNLP). Text that is in no language, or in none
of them with enough confidence, is ``und``, ISO 639-2's code for undetermined.
"""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

UNDETERMINED = "und"
_WITHOUT_LANGUAGE = "zxx"
"""ISO 639-2's code for what has no linguistic content, a class of the model."""
SAMPLE_CHARACTERS = 2000
"""Characters examined at the beginning of a text, so that a long one takes no longer."""
LEAST_CONFIDENCE = 0.5
UNSPACED = frozenset({"ja", "zh", "yue", "wuu", "th", "lo", "km", "my"})
"""Languages that write words without blanks between them."""


def language_of(text: str) -> str:
    """Returns the ISO 639 code of a text's language, or ``und``."""
    return language_and_probability(text)[0]


def language_and_probability(text: str) -> tuple[str, float]:
    """Returns the ISO 639 code of a text's language, or ``und``, and the probability of the likeliest one."""
    language, probability = _identifier().classify(text[:SAMPLE_CHARACTERS])
    return UNDETERMINED if language == _WITHOUT_LANGUAGE else str(language), float(probability)


def languages() -> frozenset[str]:
    """Returns the codes of the languages that can be told."""
    return frozenset(_identifier().labels) - {_WITHOUT_LANGUAGE}


@functools.cache
def _identifier() -> "LanguageIdentifier":
    """Loads the model: seconds, once for each process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=LEAST_CONFIDENCE)
