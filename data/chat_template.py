"""The chat template that a recipe names, a Jinja file."""

from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.schema import Tokenizer


def read_template(recipe: Tokenizer) -> str | None:
    """Returns the content of the recipe's template file; None if it names none.

    Raises:
        UserError: if it can't be read.
    """
    if recipe.chat_template is None:
        return None
    try:
        return Path(recipe.chat_template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        what = f"{recipe.chat_template} can't be read ({reason})"
        raise UserError(what, key="tokenizer.chat_template", remedy="correct the path") from None
