"""Tags that people give a run, in `tags.json`."""

import json
from collections.abc import Mapping
from pathlib import Path

from train.recipe.errors import UserError
from train.record.files import write_json

TAGS_FILE = "tags.json"
LONGEST_NAME, LONGEST_VALUE = 250, 5000
"""Characters of a tag that MLflow keeps of every version."""


def read_tags(folder: Path) -> dict[str, str]:
    """Reads a run's tags; none if there is no file.

    Raises:
        UserError: if the file is damaged.
    """
    file = folder / TAGS_FILE
    if not file.is_file():
        return {}
    try:
        tags = json.loads(file.read_bytes())
    except ValueError:
        tags = None
    if not isinstance(tags, dict) or not all(isinstance(text, str) for text in tags.values()):
        raise UserError(f"{file} is damaged", remedy="restore it, or remove it")
    return tags


def check_tag(name: str, value: str) -> None:
    """Raises for a tag that MLflow would not take, or that a line of a table can't show.

    Raises:
        UserError: one line with the remedy.
    """
    for what, text, longest in (("name", name, LONGEST_NAME), ("value", value, LONGEST_VALUE)):
        if len(text) > longest:
            problem = f"the {what} of a tag has {len(text):,} characters"
            raise UserError(problem, remedy=f"give {longest:,} at most")
        if not text.isprintable():
            raise UserError(f"{text!r} has a control character", remedy=f"give a {what} of one line")


def write_tags(folder: Path, tags: Mapping[str, str]) -> None:
    """Writes all tags of a run, atomically."""
    write_json(folder / TAGS_FILE, dict(tags), sort_keys=True)
