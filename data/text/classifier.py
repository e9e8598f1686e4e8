"""A classifier's probability of a label, by a fastText model that the user gives.

The package is optional. It has only the function that predicts, and wheels for all platforms; the module has
the name and the form of fastText's own.
"""

import functools
from pathlib import Path
from typing import Any

from train.recipe.errors import UserError

PACKAGE = "fasttext-predict"


def probability_of(text: str, model: str, label: str, key: str = "data.sources") -> float:
    """Returns the probability of a label, in [0, 1]; of a text without words, that of the empty line.

    Args:
        text: the text; fastText takes one line, so line ends become blanks.
        model: path of a supervised fastText model, .bin or .ftz.
        label: one of its labels.
        key: key of the source in the recipe, for errors.

    Raises:
        UserError: if the package or the model is missing, the model can't be read, or it has no such label.
    """
    labels, probabilities = _open(model, key).predict(" ".join(text.split()), k=-1)
    found = dict(zip(labels, probabilities, strict=True))
    if label not in found:
        remedy = f"it has {', '.join(sorted(found)[:20])}" if found else "give a supervised model"
        what = f"{model} has no label {label!r}"
        raise UserError(what, key=f"{key}.classifier_label", remedy=remedy)
    return min(1.0, float(found[label]))


@functools.lru_cache(maxsize=2)
def _open(model: str, key: str) -> Any:
    """Loads a model once per process."""
    try:
        import fasttext
    except ModuleNotFoundError:
        what = f"{model} needs a package that reads fastText models"
        raise UserError(what, key=f"{key}.classifier", remedy=f"pip install {PACKAGE}") from None
    if not Path(model).is_file():
        raise UserError(f"{model} is no file", key=f"{key}.classifier", remedy="correct the path")
    try:
        return fasttext.load_model(model)
    except (ValueError, RuntimeError, MemoryError) as error:
        what = f"{model} can't be read ({' '.join(str(error).split())[:150]})"
        raise UserError(what, key=f"{key}.classifier", remedy="give a fastText model (.bin)") from None
