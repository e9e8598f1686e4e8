"""A key of a recipe, declared once: default, range, the choice that reads it, and where it may change.

The schema's fields are made by :func:`key`. The rules, ``--help``, the check of a run that is resumed or
that starts from other weights, and the digest of prepared shards all read the same declaration.
"""

import ast
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import MISSING

from train.recipe.errors import Violation


class OnResume(str, Enum):
    """Whether a key may differ when a run is resumed."""

    free = "free"
    """It does not change what is trained."""
    edit = "edit"
    """For what is still to come: :func:`train.recipe.curriculum.continue_stages` refuses what would rewrite
    the past, and :func:`train.record.run_folder.require_same_data` other shards than were read."""
    never = "never"


class OnStart(str, Enum):
    """Whether a key of the model may differ from that of the weights which step 0 starts from."""

    free = "free"
    """It changes neither a shape nor the function at step 0, or is meant to be changed."""
    told = "told"
    """It changes the function but no shape: the change is printed."""
    equal = "equal"


@dataclass(frozen=True)
class KeyRules:
    """What holds for a key besides its type."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    remedy: str = ""
    """Of a number out of range; empty: made of the range."""
    read_when: str = ""
    """The only choice that reads it, ``some.key == value``; empty: always read."""
    on_resume: OnResume | None = None
    """None: as the section says, and without one there ``never``."""
    on_start: OnStart | None = None
    """None: as the section says, and without one there ``equal``."""
    in_shards_digest: bool = True
    """Of a source or the preparation: whether other values make other shards."""

    @property
    def range(self) -> str:
        """The range in words; empty where there is none."""
        if self.at_least is not None and self.at_most is not None:
            return f"in [{self.at_least:g}, {self.at_most:g}]"
        if self.at_least is not None and self.below is not None:
            return f"in [{self.at_least:g}, {self.below:g})"
        bounds = {
            "above": self.above,
            "at least": self.at_least,
            "below": self.below,
            "at most": self.at_most,
        }
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    def admits(self, number: float) -> bool:
        """Whether a number lies in the range; infinity and NaN lie in none."""
        return not self.range or (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )

    def within(self, section: "KeyRules") -> "KeyRules":
        """These rules, with the section's where the key says nothing of its own."""
        return replace(
            self,
            on_resume=self.on_resume or section.on_resume,
            on_start=self.on_start or section.on_start,
        )


@dataclass(frozen=True)
class SchemaKey:
    """A key as the schema declares it."""

    name: str
    """With dots; ``[]`` stands for the number of a list's item."""
    field: dataclasses.Field[Any]
    doc: str
    rules: KeyRules
    """With what its sections say."""


def key(default: Any = MISSING, *, factory: Callable[[], Any] | None = None, **rules: Any) -> Any:
    """A field of the schema.

    Args:
        default: its value where a recipe does not give it; none: every recipe must.
        factory: makes the default, where that can be changed: a list, a mapping, a section.
        **rules: fields of :class:`KeyRules`; those of a section hold for the keys in it.
    """
    metadata = {"rules": KeyRules(**rules)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def rules_of(schema_field: dataclasses.Field[Any]) -> KeyRules:
    """What a field of the schema declares itself."""
    return schema_field.metadata.get("rules", KeyRules())


def walk(schema: type, prefix: str = "", within: KeyRules = KeyRules()) -> Iterator[SchemaKey]:
    """Every key of a part of the schema, those of its sections behind it.

    A section without a docstring of its own is no key.

    Args:
        schema: dataclass of the part.
        prefix: of the names.
        within: rules of the section that the part is.
    """
    docs = _field_docs(schema)
    for schema_field in fields(schema):
        name, rules = prefix + schema_field.name, rules_of(schema_field).within(within)
        if schema_field.name in docs:
            yield SchemaKey(name, schema_field, docs[schema_field.name], rules)
        section = _section_type(schema_field)
        if section is not None:
            many = "[]" if getattr(schema_field.type, "__origin__", None) is list else ""
            yield from walk(section, f"{name}{many}.", rules)


def out_of_range(section: Any, prefix: str = "") -> Iterator[Violation]:
    """Every number of a section, and of the sections in it, that its key's range does not admit.

    Args:
        section: instance of the schema or of a part of it.
        prefix: of the keys that are named.
    """
    for schema_field in fields(section):
        name, rules = prefix + schema_field.name, rules_of(schema_field)
        for at, value in _values(getattr(section, schema_field.name)):
            if is_dataclass(value):
                yield from out_of_range(value, f"{name}{at}.")
            elif isinstance(value, int | float) and not rules.admits(value):
                yield Violation(f"{name}{at}", f"is {value}", rules.remedy or _remedy(rules))


def _remedy(rules: KeyRules) -> str:
    if rules.range == "at least 0":
        return "must not be negative"
    return f"must {'lie' if rules.range.startswith('in') else 'be'} {rules.range}"


def _values(value: Any) -> list[tuple[str, Any]]:
    """A value, or those of a list or a mapping, each with what names it behind the key."""
    if isinstance(value, list):
        return [(f"[{n}]", item) for n, item in enumerate(value)]
    if isinstance(value, dict):
        return [(f".{name}", item) for name, item in value.items()]
    return [("", value)]


def _section_type(schema_field: dataclasses.Field[Any]) -> type | None:
    for candidate in (schema_field.type, *getattr(schema_field.type, "__args__", ())):
        if is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


@functools.cache
def _field_docs(schema: type) -> dict[str, str]:
    """The string literal under each field, which Python itself does not keep."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[before.target.id] = " ".join(str(after.value.value).split())
    return docs
