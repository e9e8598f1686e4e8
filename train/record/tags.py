"""Tags that people give a run, in `tags.json`."""

import json
from collections.abc import Mapping
from pathlib import Path

from train.recipe.errors import UserError
from train.record.files import write_json

TAGS_FILE = "tags.json"


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


def write_tags(folder: Path, tags: Mapping[str, str]) -> None:
    """Writes all tags of a run, atomically."""
    write_json(folder / TAGS_FILE, dict(tags), sort_keys=True)
