"""Reads recipes: YAML over the schema, ``extends:`` for a base recipe, ``key=value`` on top.

Every mistake is a :class:`UserError` of one line, all of them at once, raised before torch is imported.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import re
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import Container, DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from train.recipe.aliases import ALIASES, TITAN, origin_of
from train.recipe.catalogue import schema_keys
from train.recipe.errors import UserError, raise_all
from train.recipe.old_keys import renamed, renamed_in
from train.recipe.scalars import meant, read_value, read_yaml
from train.recipe.schema import Recipe
from train.recipe.secrets import guarded_environment, without_secrets

MIXTURE = "data.domains"
"""Shares must add up to 1, so a mixture replaces the base recipe's as a whole; `data.domains.X=0.5` on the
command line changes one share."""
PHASES = "data.phases"
"""The alternative to `data.domains`: setting either replaces the other in a base recipe.
`data.phases[0].tokens=1000000000` on the command line changes one phase, as in every list."""
_ITEM = re.compile(r"([A-Za-z_][\w.]*?)[\[.](\d+)(?=[\].]|$)")
"""A key within an item of a list: the list's name, and the number of the item."""


@guarded_environment()
def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe with its bases and overrides, checks every key, and returns it.

    Args:
        path: the YAML file.
        overrides: ``key=value`` strings, which win over the file.

    Raises:
        UserError: one line that names file, key and remedy.
    """
    merged = copy.deepcopy(_defaults())
    given: dict[str, tuple[int, str]] = {}
    files, overrides = _layers(Path(path), ()), overrides or []
    parts = {n for n, text in enumerate(overrides, len(files)) if text.startswith(f"{MIXTURE}.")}
    errors: list[UserError] = []
    for depth, (file, layer) in enumerate([*files, *_override_layers(overrides)]):
        if isinstance(layer, Item):
            try:
                _set_item(merged, layer)
            except (OmegaConfBaseException, UserError) as error:
                errors.append(_explain(error, file))
            given[layer.key] = depth, file
            continue
        has_phases = bool(OmegaConf.select(layer, PHASES))
        with read_write(merged.data):
            if has_phases or (OmegaConf.select(layer, MIXTURE) and depth not in parts):
                merged.data.domains = {}
            if not has_phases and OmegaConf.select(layer, MIXTURE):
                merged.data.phases = []
        try:
            OmegaConf.unsafe_merge(merged, copy.deepcopy(layer))  # in place: a copy of the schema is dear
        except (OmegaConfBaseException, TypeError) as error:
            errors += _mistakes_in(merged, layer, file) or [_explain(error, file)]
        given |= dict.fromkeys(_leaf_keys(OmegaConf.to_container(layer)), (depth, file))
    raise_all(errors)
    try:
        raise_all(
            [
                UserError("is missing", key=key, remedy=f"add `{key}:` to the recipe", file=str(path))
                for key in sorted(OmegaConf.missing_keys(merged), key=_place_in_schema)
            ]
        )
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a reference to something that is not there
        raise _explain(error, str(path)) from None
    assert isinstance(recipe, Recipe)
    _refuse_unread(recipe, given)
    return recipe


@functools.cache
def _defaults() -> DictConfig:
    """The schema with its defaults, not to be changed: to make it takes longer than to read a recipe."""
    return OmegaConf.structured(Recipe)


def to_yaml(recipe: Recipe) -> str:
    """Writes the resolved recipe as YAML that :func:`load_recipe` reads back to an equal recipe.

    Omits keys that the recipe's choices leave unread, and secrets (:func:`to_dict`).
    """
    return OmegaConf.to_yaml(OmegaConf.create(to_read_dict(recipe)))


def to_read_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values, without the keys that its choices leave unread."""
    tree = to_dict(recipe)
    for key, condition in _conditions().items():
        if not _is_met(recipe, condition):
            parent, leaf = key.rsplit(".", 1)
            branch = _dig(tree, parent)
            if branch is not None:
                del branch[leaf]
    return tree


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values; addresses without passwords, keys and tokens."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return without_secrets(value) if isinstance(value, str) else value

    return plain(dataclasses.asdict(recipe))


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """The recipe's files, base first, each as (file, config)."""
    if path.resolve() in seen:
        raise UserError("extends itself", key="extends", remedy="remove the cycle", file=str(path))
    if not path.is_file():
        raise _no_recipe(path)
    try:
        tree = read_yaml(path.read_text())
        origin = origin_of(tree) if isinstance(tree, dict) else ""
        if origin:
            raise _foreign(path, origin)
        config = OmegaConf.create(meant("", renamed_in(tree))) if isinstance(tree, dict) else tree
    except UserError as error:
        raise error.at(str(path)) from None
    except RecursionError:
        what = "is nested too deeply, or contains itself"
        raise UserError(what, remedy="write `key: value` lines", file=str(path)) from None
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", remedy="correct it", file=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        if path.suffix == ".toml":
            raise _foreign(path, TITAN).at(str(path)) from None
        line = " ".join(str(error).split())
        raise UserError(f"is not YAML: {line}", remedy="correct the syntax", file=str(path)) from None
    if not isinstance(config, DictConfig):
        raise UserError("is not a mapping of keys", remedy="write `key: value` lines", file=str(path))
    bases = config.pop("extends", None) or []
    below = [
        layer
        for base in ([bases] if isinstance(bases, str) else bases)
        for layer in _layers(path.parent / str(base), (*seen, path.resolve()))
    ]
    return [*below, (str(path), config)]


def _no_recipe(path: Path) -> UserError:
    """Returns the error of a path that is no file, with the recipe that may be meant."""
    what = "no such recipe"
    if path.is_symlink():
        what = f"is a link to {path.readlink()}, which is no file"
    elif path.is_dir():
        what = "is a folder, not a recipe"
    others = [each.name for each in path.parent.glob("*.yaml") if each.is_file()]
    near = difflib.get_close_matches(path.name, others, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
    return UserError(what, remedy=hint, file=str(path))


def _foreign(path: Path, origin: str) -> UserError:
    return UserError(
        f"looks like a recipe of {origin}", remedy=f"`python -m train.translate {path}` translates it"
    )


class Item(NamedTuple):
    """A setting of one item of a list, such as ``data.phases[0].tokens``, which changes only that item."""

    key: str
    value: Any

    @property
    def place(self) -> tuple[str, int]:
        """The list's name and the number of the item."""
        found = _ITEM.match(self.key)
        assert found is not None, "an item is made of such a key only"
        return found[1], int(found[2])


def _set_item(merged: DictConfig, item: Item) -> None:
    """Changes one item of a list.

    Raises:
        UserError: if the list has no such item.
    """
    name, number = item.place
    items = OmegaConf.select(merged, name)
    if not isinstance(items, ListConfig) or number >= len(items):
        count = len(items) if isinstance(items, ListConfig) else 0
        raise UserError(
            f"is not there: the recipe has {count} of {name}, numbered from 0",
            key=f"{name}[{number}]",
            remedy=f"give {name} as a whole list",
        )
    above = OmegaConf.select(merged, re.split(r"[\[.]\w+\]?$", item.key)[0])
    with read_write(above) if isinstance(above, Container) else contextlib.nullcontext():
        OmegaConf.update(merged, item.key, OmegaConf.create({"value": item.value}).value)


def _mistakes_in(merged: DictConfig, layer: DictConfig, file: str) -> list[UserError]:
    """Returns the mistakes of a layer that can't be merged, by merging each of its keys by itself."""
    errors: list[UserError] = []
    for key in _leaf_keys(OmegaConf.to_container(layer)):
        one = OmegaConf.create({})
        try:
            OmegaConf.update(one, key, OmegaConf.select(layer, key))
            OmegaConf.merge(merged, one)
        except (OmegaConfBaseException, TypeError) as error:
            errors.append(_explain(error, file, key))
    return errors


def _place_in_schema(key: str) -> tuple[int, str]:
    names = list(schema_keys())
    name = re.sub(r"\[\d+\]", "[]", key)
    return (names.index(name) if name in names else len(names)), key


def _override_layers(overrides: list[str]) -> list[tuple[str, Any]]:
    layers: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, written = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"`{text}` is not key=value", remedy="for example training.clip_norm=0.5")
        layer = OmegaConf.create({})
        key, written = renamed(key, written)
        try:
            value = read_value(key, written)
            item = _ITEM.match(key)
            if item is not None and _is_list(item[1]):
                layers.append(("command line", Item(key, value)))
                continue
            OmegaConf.update(layer, key, value)
        except UserError as error:
            raise error.at("command line") from None
        except Exception as error:  # PyYAML and OmegaConf raise unrelated classes for malformed text.
            line = " ".join(str(error).split())
            raise UserError(
                f"cannot be read: {line}", key=key, remedy="quote it", file="command line"
            ) from None
        layers.append(("command line", layer))
    return layers


def _is_list(key: str) -> bool:
    known = schema_keys().get(key)
    return known is not None and getattr(known.field.type, "__origin__", None) is list


def _explain(error: OmegaConfBaseException | UserError | TypeError, file: str, key: str = "") -> UserError:
    """Turns OmegaConf's error into one of ours, in one line.

    Args:
        error: the error.
        file: the recipe's file.
        key: the key that was merged, of a TypeError: a list where the schema has a mapping, or the reverse.
    """
    if isinstance(error, UserError):
        return error.at(file)
    if not isinstance(error, OmegaConfBaseException):
        return _of_another_shape(key, file)
    outer: BaseException = error
    while (inner := outer.__cause__ or outer.__context__) is not None:
        if isinstance(inner, UserError):  # One of ours, in a resolver.
            return inner.at(file)
        outer = inner
    text = str(error).split("\n")[0]
    key = str(error.full_key or error.key or key)
    in_schema = re.sub(r"\[\d+\]", "[]", key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        if key in ALIASES or key.rsplit(".", 1)[-1] in ALIASES:
            remedy = ALIASES.get(key) or ALIASES[key.rsplit(".", 1)[-1]]
            return UserError("unknown key", key=key, remedy=f"here it is {remedy}", file=file)
        names = list(schema_keys())
        near = difflib.get_close_matches(in_schema, names, n=1, cutoff=0.5) or difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [n.rsplit(".", 1)[-1] for n in names], n=1, cutoff=0.6
        )
        remedy = f"did you mean `{near[0]}`?" if near else "remove it; --help lists every key"
        return UserError("unknown key", key=key, remedy=remedy, file=file)
    known = schema_keys().get(in_schema)
    if "'None'" in text or "is not Optional" in text:
        text = "is empty"
    elif isinstance(error, ValidationError) and " is not a subclass of " in text:
        text, remedy = "has keys of its own, and no value", f"{key}.KEY=VALUE sets one"
        return UserError(text, key=key, remedy=remedy, file=file)
    remedy = f"it means: {known.doc.split('.')[0]}" if known else "--help lists every key and its type"
    return UserError(text, key=key, remedy=remedy, file=file)


def _of_another_shape(key: str, file: str) -> UserError:
    """Returns the error of a list where the schema has a mapping, or the reverse."""
    place = re.split(r"[\[.]", key)
    names = (".".join(place[:n]) for n in range(len(place), 0, -1))
    name = next((each for each in names if each in schema_keys()), key)
    if _is_list(name):
        remedy = f"an item is {name}[0], {name}[1], ..., and the whole list {name}=[...]"
        return UserError("is a list, whose items have numbers", key=name, remedy=remedy, file=file)
    return UserError(
        "has keys, and no list of items", key=name, remedy=f"{name}.KEY=VALUE sets one", file=file
    )


def _refuse_unread(recipe: Recipe, given: dict[str, tuple[int, str]]) -> None:
    """Raises for a key that is set but left unread by the recipe's choices.

    A base recipe's key is ignored if a later layer made the other choice: in the base it was right.
    """
    errors: list[UserError] = []
    for key, condition in _conditions().items():
        if key not in given or _is_met(recipe, condition):
            continue
        depth, file = given[key]
        choice = condition.split(" == ")[0]
        parents = [choice.rsplit(".", n)[0] for n in range(choice.count(".") + 1)]
        if depth >= max((given[k][0] for k in parents if k in given), default=-1):
            errors.append(
                UserError(
                    f"nothing reads this key unless {condition}",
                    key=key,
                    remedy=f"remove it, or set {condition.split(' or ')[0].replace(' == ', '=')}",
                    file=file,
                )
            )
    raise_all(errors)


def _conditions() -> dict[str, str]:
    """Maps each conditional key to the choice that reads it."""
    return {name: key.rules.read_when for name, key in schema_keys().items() if key.rules.read_when}


def _is_met(recipe: Recipe, condition: str) -> bool:
    key, _, wanted = condition.partition(" == ")
    value = _dig(to_dict(recipe), key)
    return str(value) in wanted.split(" or ")


def _dig(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _leaf_keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix[:-1]]
    return [leaf for name, value in tree.items() for leaf in _leaf_keys(value, f"{prefix}{name}.")]
