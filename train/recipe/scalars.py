"""Values of recipes as they are written: the schema's type decides what they mean, not their looks.

To YAML 1.1 `name: on` is true, `version: 3.10` the number 3.1 and `tokens: 2e9` a text. Here a key for text
gets the text, and a key for whole numbers every spelling of one. Folders begin at home with `~`, and may name
variables of the environment.
"""

import os
import re
import types
from collections.abc import Hashable
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from train.recipe.catalogue import schema_keys
from train.recipe.errors import UserError
from train.recipe.secrets import require_no_secret

COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
"""Units of whole numbers, in either case: 300B tokens."""
MOST_DIGITS = 30
BYTES = {f"{unit}b": size for unit, size in {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}.items()}
BYTES |= {unit.removesuffix("b"): size for unit, size in BYTES.items()}
"""Units of bytes, where a B is a byte."""


class _AsWritten(yaml.SafeLoader):
    """Reads plain scalars as text, but for null; refuses a key that occurs twice in a mapping."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own name and type)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if name.value in seen and not name.tag.endswith(":merge"):
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{name.value}` occurs twice", name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Reads YAML into mappings, lists, None, and scalars as they are written.

    Raises:
        yaml.YAMLError: for malformed text.
    """
    return yaml.load(text, _AsWritten)


def read_value(key: str, text: str) -> Any:
    """Reads the value of ``key=value`` on the command line; a key for text takes it whole, unless quoted.

    Raises:
        yaml.YAMLError: for malformed text.
        UserError: see :func:`meant`.
    """
    known = schema_keys().get(_in_schema(key))
    is_text = known is not None and known.field.type in (str, str | None)
    if is_text and text and not re.match(r"""['"\s]|null$|~$""", text):
        return meant(key, text)
    return meant(key, read_yaml(text))


def meant(key: str, value: Any) -> Any:
    """Returns a value with its scalars as the schema's types want them, where OmegaConf cannot convert them.

    Args:
        key: dotted name, empty for a whole recipe.
        value: as :func:`read_yaml` returns it.

    Raises:
        UserError: for a text that no file can hold or be called, and for a folder with a variable that is not
            set, or that looks like a secret.
    """
    _require_text(key, value)
    if isinstance(value, dict):
        for name in value:
            _require_text(key, name)
        return {name: meant(f"{key}.{name}" if key else str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [meant(f"{key}[]", item) for item in value]
    if not isinstance(value, str) or "${" in value:
        return value
    kind = _type_of(key)
    if kind is int:
        return _whole(value, BYTES if key.endswith("_bytes") else COUNTS)
    if kind is float and re.fullmatch(r"[-+]?\.(inf|nan)", value, re.IGNORECASE):
        return float(value.replace(".", ""))
    if kind is str and _names_a_folder(key):
        return _folder(key, value)
    return value


def _require_text(key: str, value: Any) -> None:
    """Raises for a text with a NUL character, which ends a path, or with bytes that are not UTF-8."""
    if not isinstance(value, str):
        return
    # Python keeps a foreign byte of the command line as half of a character.
    foreign = any("\ud800" <= character <= "\udfff" for character in value)
    if foreign or "\0" in value:
        what = "has bytes that are not UTF-8" if foreign else "has a NUL character"
        raise UserError(f"{value!r} {what}", key=key, remedy="write it without")


def _whole(text: str, units: dict[str, int]) -> str | int:
    """Returns the whole number that a text such as 2e9, 1_000_000 or 1.2B means; any other text as it is."""
    written, factor = text, 1
    for unit, size in units.items():
        if text.lower().endswith(unit):
            written, factor = text[: -len(unit)].rstrip(), size
            break
    try:
        # Exact, where a float of 1.1e9 * 1e3 would not be.
        number = Decimal(written) * factor
        is_whole = number.adjusted() < MOST_DIGITS and number == number.to_integral_value()
        return int(number) if is_whole else text
    except (ArithmeticError, ValueError):  # No number, infinity or NaN.
        return text


def _folder(key: str, text: str) -> str:
    for variable in re.findall(r"\$(\w+)", text):
        require_no_secret(variable, key)
    found = os.path.expandvars(str(Path(text).expanduser()) if text.startswith("~") else text)
    unset = re.search(r"\$(\w+)", found)
    if unset:
        raise UserError(f"${unset[1]} is not set", key=key, remedy="set it, or write the folder out")
    return found


def _names_a_folder(key: str) -> bool:
    known = schema_keys().get(_in_schema(key.removesuffix("[]")))
    return known is not None and known.rules.is_path


def _type_of(key: str) -> type | None:
    """Returns the type of a key's scalars: that of its elements for a list or mapping; None: unknown key."""
    name, keys = _in_schema(key), schema_keys()
    for candidate in (name, name.removesuffix("[]"), name.rpartition(".")[0]):
        if candidate in keys:
            kinds = _scalar_types(keys[candidate].field.type)
            return kinds[-1] if kinds else None
    return None


def _in_schema(key: str) -> str:
    return re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "[]", key)


def _scalar_types(kind: Any) -> list[type]:
    """Returns the types of scalars within a type; of a mapping, those of its values."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType, list, dict):
        inner = get_args(kind)[-1:] if origin is dict else get_args(kind)
        return [found for part in inner for found in _scalar_types(part)]
    is_scalar = isinstance(kind, type) and (kind in (str, int, float, bool) or issubclass(kind, Enum))
    return [kind] if is_scalar else []
