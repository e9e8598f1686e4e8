"""The catalogue of recipe keys: by name, with their `--help` text and whether they may change on resume."""

import dataclasses
import functools
from enum import Enum

from omegaconf import MISSING

from train.recipe.keys import OnResume, SchemaKey, walk
from train.recipe.schema import Recipe

RESUME_WORDS = {OnResume.free: "free on resume", OnResume.edit: "editable on resume"}
HELP = """recipe keys, each also a key=value argument. On resume, keys marked `free on resume` may change,
those marked `editable on resume` may change for batches still to come, and all others must stay the same:
"""


@functools.cache
def schema_keys() -> dict[str, SchemaKey]:
    """Returns every key of the schema by name, in the schema's order."""
    return {key.name: key for key in walk(Recipe)}


def on_resume(name: str) -> OnResume:
    """Returns whether a key, or an entry of a mapping key, may change on resume."""
    keys = schema_keys()
    while name and name not in keys:
        name = name.rpartition(".")[0]
    return (name and keys[name].rules.on_resume) or OnResume.never


def describe_keys() -> str:
    """Describes every key for ``--help``: default, range, changes on resume, and docstring."""
    lines = [HELP]
    for key in schema_keys().values():
        facts = [default_text(key), key.rules.range, RESUME_WORDS.get(on_resume(key.name), "")]
        if key.rules.read_when:
            facts.append(f"read when {key.rules.read_when}")
        lines.append(f"  {key.name}  ({'; '.join(filter(None, facts))})\n      {key.doc}")
    return "\n".join(lines)


def default_text(key: SchemaKey) -> str:
    """Returns ``default ...``, ``required``, or ``section`` for a key that holds others."""
    value = key.field.default
    if value == MISSING:
        return "required"
    if key.field.default_factory is not dataclasses.MISSING:
        value = key.field.default_factory()
    if dataclasses.is_dataclass(value):
        return "section"
    if isinstance(value, Enum):
        value = value.value
    return f"default {'null' if value is None else value}"
