"""The catalogue of a recipe's keys: each by its name, what `--help` says of it, and whether it may change."""

import dataclasses
import functools
from enum import Enum

from omegaconf import MISSING

from train.recipe.keys import OnResume, SchemaKey, walk
from train.recipe.schema import Recipe

RESUME_WORDS = {OnResume.free: "free on resume", OnResume.edit: "editable on resume"}
HELP = """keys of a recipe, each also a key=value argument. A resumed run keeps the recipe that it was begun
with; only keys that are `free on resume` may differ, and those `editable on resume` for what is to come:
"""


@functools.cache
def schema_keys() -> dict[str, SchemaKey]:
    """Every key of the schema by its name, in the schema's order."""
    return {key.name: key for key in walk(Recipe)}


def on_resume(name: str) -> OnResume:
    """Whether a key, or an entry of a key that is a mapping, may differ when a run is resumed."""
    keys = schema_keys()
    while name and name not in keys:
        name = name.rpartition(".")[0]
    return (name and keys[name].rules.on_resume) or OnResume.never


def describe_keys() -> str:
    """Every key with its default, range, what may change, and docstring, for ``--help``."""
    lines = [HELP]
    for key in schema_keys().values():
        facts = [_default_text(key), key.rules.range, RESUME_WORDS.get(on_resume(key.name), "")]
        if key.rules.read_when:
            facts.append(f"read when {key.rules.read_when}")
        lines.append(f"  {key.name}  ({'; '.join(filter(None, facts))})\n      {key.doc}")
    return "\n".join(lines)


def _default_text(key: SchemaKey) -> str:
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
