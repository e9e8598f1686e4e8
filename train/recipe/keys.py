"""A recipe key, declared once: default, range, the choice that reads it, and when it may change.

:func:`key` makes the schema's fields. The rules, ``--help``, the checks on resume and on a start from other
weights, and the digest of prepared shards all read the same declaration.
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
    """Permission to change a key when a run is resumed."""

    free = "free"
    """It does not change what is trained."""
    edit = "edit"
    """For the batches still to come: :func:`train.recipe.curriculum.continue_stages` refuses changes to the
    past, and :func:`train.record.run_folder.require_same_data` refuses other shards than were read."""
    never = "never"


class OnStart(str, Enum):
    """Permission for a model key to differ from the model whose weights training starts from."""

    free = "free"
    """It changes neither a shape nor the function at step 0, or is meant to be changed."""
    reported = "reported"
    """It changes the function but no shape: allowed, and the change is printed."""
    equal = "equal"


@dataclass(frozen=True)
class KeyRules:
    """The rules of a key besides its type."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    remedy: str = ""
    """Shown for a number out of range; empty: derived from the range."""
    read_when: str = ""
    """The only choices that read the key, ``some.key == value or other``; empty: always read."""
    on_resume: OnResume | None = None
    """None: the section's, or ``never`` if it has none."""
    on_start: OnStart | None = None
    """None: the section's, or ``equal`` if it has none."""
    same_on_fork: bool = False
    """A fork keeps it: the order of the data or the optimizer's state follows from it."""
    is_path: bool = False
    """Names a file or folder: `~` and variables of the environment are expanded."""
    in_shards_digest: bool = True
    """For keys of sources and preparation: another value makes other shards."""
    omitted_from_digest_at_default: bool = False
    """The same, for keys that are younger than the first shards, whose digest knows nothing of them."""

    @functools.cached_property
    def range(self) -> str:
        """The range in words; empty if there is none."""
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
        """True if a number is in the range; infinity and NaN never are."""
        return not self.range or (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )

    def within(self, section: "KeyRules") -> "KeyRules":
        """Returns these rules, with the section's where the key declares none."""
        return replace(
            self,
            on_resume=self.on_resume or section.on_resume,
            on_start=self.on_start or section.on_start,
        )


_NO_RULES = KeyRules()


@dataclass(frozen=True)
class SchemaKey:
    """A key as the schema declares it."""

    name: str
    """Dotted; ``[]`` stands for a list index."""
    field: dataclasses.Field[Any]
    doc: str
    rules: KeyRules
    """Including those inherited from its sections."""


def key(default: Any = MISSING, *, factory: Callable[[], Any] | None = None, **rules: Any) -> Any:
    """Declares a field of the schema.

    Args:
        default: value if a recipe does not set it; without one, every recipe must.
        factory: makes a mutable default: a list, a mapping or a section.
        **rules: fields of :class:`KeyRules`; the keys of a section inherit its rules.
    """
    metadata = {"rules": KeyRules(**rules)}
    if factory is not None:
        # Sections with lists are keys of caches too.
        return field(default_factory=factory, metadata=metadata, hash=None if factory is not list else False)
    return field(default=default, metadata=metadata)


def rules_of(schema_field: dataclasses.Field[Any]) -> KeyRules:
    """Returns the rules that a field declares itself."""
    return schema_field.metadata.get("rules", _NO_RULES)


def walk(schema: type, prefix: str = "", within: KeyRules = KeyRules()) -> Iterator[SchemaKey]:
    """Yields every key of a part of the schema; a section's keys follow the section.

    A section field without a docstring is not itself a key.

    Args:
        schema: dataclass of the part.
        prefix: prefix of the names.
        within: rules inherited from the enclosing section.
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


LARGEST_WHOLE = 2**63 - 1
"""Whole numbers go into tensors, files and random generators, which hold 64 bits."""


def out_of_range(section: Any, prefix: str = "") -> Iterator[Violation]:
    """Yields a violation for every number in a section, or in the sections within it, that is out of range.

    Args:
        section: instance of the schema or of a part of it.
        prefix: prefix of the keys' names.
    """
    for schema_field in fields(section):
        name, rules = prefix + schema_field.name, rules_of(schema_field)
        for at, value in _values(getattr(section, schema_field.name)):
            if is_dataclass(value):
                yield from out_of_range(value, f"{name}{at}.")
            elif isinstance(value, dict | list):
                yield Violation(f"{name}{at}", f"is {value}", "give a single value")
            elif isinstance(value, int) and abs(value) > LARGEST_WHOLE:
                yield Violation(f"{name}{at}", f"is {value}", "must fit into 64 bits")
            elif isinstance(value, int | float) and not rules.admits(value):
                yield Violation(f"{name}{at}", f"is {value}", rules.remedy or _remedy(rules))


def _remedy(rules: KeyRules) -> str:
    if rules.range == "at least 0":
        return "must not be negative"
    return f"must {'lie' if rules.range.startswith('in') else 'be'} {rules.range}"


def _values(value: Any) -> list[tuple[str, Any]]:
    """Returns a value, or the items of a list or mapping, each with its suffix of the key's name."""
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
    """Returns the string literal under each field; Python itself does not keep it."""
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
