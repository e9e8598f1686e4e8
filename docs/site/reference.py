"""The page of recipe keys, from the schema's own declarations."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from train.recipe.catalogue import default_text, on_resume, schema_keys
from train.recipe.keys import OnResume, OnStart, SchemaKey

INTRODUCTION = """\
Recipe keys
===========

Every key of a recipe. It stands in the YAML file under its section, or on the command line as ``key=value``,
where ``[]`` is an index: ``data.sources[0].path=...``. ``python train/main.py --help`` prints them too.

*On resume* says whether a key may change when a run is resumed: freely, since it changes nothing that is
trained; for the batches still to come; or not at all. In a fork (:doc:`runs`) more may change. *On a start
from weights* says of the model's keys whether they may differ from the model that ``start.weights`` names.
"""
ON_RESUME = {
    OnResume.free: "may change",
    OnResume.edit: "may change for batches still to come",
    OnResume.never: "stays",
}
ON_START = {
    OnStart.free: "may differ",
    OnStart.reported: "may differ, and is printed",
    OnStart.equal: "is the same",
}
PLAIN_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def reference() -> str:
    """Returns the page in reStructuredText: for each section its keys, with their facts and docstrings."""
    sections: dict[str, list[SchemaKey]] = {}
    for key in schema_keys().values():
        sections.setdefault(_section(key), []).append(key)
    lines = [INTRODUCTION]
    for section, keys in sections.items():
        lines += [section, "-" * len(section), ""]
        for key in keys:
            lines += [f".. recipe-key:: {key.name}", ""]
            lines += [f"   {key.doc}", "", "   .. rst-class:: facts", "", f"   {'; '.join(facts(key))}", ""]
    return "\n".join(lines)


def facts(key: SchemaKey) -> Iterator[str]:
    """Yields what is declared of a key."""
    yield type_in_words(key.field.type)
    default = default_text(key)
    if default == "required":
        yield "required"
    elif default != "section":
        value = default.removeprefix("default ")
        yield f"default ``{value}``" if value else "default: empty"
    if key.rules.range:
        yield key.rules.range
    if key.rules.read_when:
        yield f"read when ``{key.rules.read_when}``"
    yield f"on resume: {ON_RESUME[on_resume(key.name)]}" + (
        ", also in a fork" if key.rules.same_on_fork else ""
    )
    if key.name.startswith("model."):
        yield f"on a start from weights: {ON_START[key.rules.on_start or OnStart.equal]}"


def type_in_words(annotation: Any) -> str:
    """Returns a field's type in words: ``whole number or null``, ``one of adamw, lion, muon``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(each) for each in arguments)
    if annotation is types.NoneType:
        return "null"
    if origin is list:
        return f"list of {type_in_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_in_words(arguments[0])} to {type_in_words(arguments[1])}"
    if dataclasses.is_dataclass(annotation):
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(f"``{each.value}``" for each in annotation)
    return PLAIN_TYPES[annotation]


def _section(key: SchemaKey) -> str:
    """Returns the section that a key is shown under; a section's own entry stands under itself."""
    dotted = key.name if f"{key.name}." in _prefixes() or f"{key.name}[]." in _prefixes() else ""
    return dotted or key.name.rpartition(".")[0].removesuffix("[]") or "The run"


def _prefixes() -> set[str]:
    return {name.rpartition(".")[0] + "." for name in schema_keys()}
