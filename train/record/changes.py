"""Changes of a run's recipe, in `changes.json`: when, by which key, from what to what; never shortened.

A run is changed when it is forked from another one, and when it is resumed with other values of the keys that
may change then.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe, to_read_dict
from train.recipe.schema import Recipe
from train.record.files import write_json
from train.record.run_folder import RECIPE_FILE

CHANGES_FILE = "changes.json"
NOT_TRAINED = ("name", "runs_dir", "on_existing", "start.run", "start.batch")
"""Keys that say where a run is and where it came from, not how it trains."""


@dataclass(frozen=True)
class KeyChange:
    """One key's change."""

    key: str
    before: Any
    """Plain value; None also if the key was not read or did not exist."""
    now: Any


@dataclass(frozen=True)
class Change:
    """The changes of a recipe at one start of a run."""

    batch: int
    """Batches trained before it."""
    tokens: int
    """Tokens trained before it."""
    time: str
    """For people, in UTC."""
    run: str
    """Name of the run that was started."""
    fork_of: str
    """Folder of the run that it was forked from by this start; empty if it was resumed."""
    keys: tuple[KeyChange, ...]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[KeyChange]:
    """Returns the keys by which two recipes differ, in alphabetical order.

    Args:
        before: a recipe's keys, see :func:`keys_of`.
        now: another one's.
    """
    keys = sorted((before.keys() | now.keys()) - set(NOT_TRAINED))
    return [KeyChange(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def keys_of(recipe: Recipe) -> dict[str, Any]:
    """Returns the keys that a recipe reads, by dotted name, with plain values."""
    return dict(_flat(to_read_dict(recipe)))


def keys_at(folder: Path, batch: int) -> dict[str, Any]:
    """Returns a run's keys as they were when a batch was trained: later changes are undone."""
    keys = keys_of(load_recipe(folder / RECIPE_FILE))
    for change in reversed(read_changes(folder)):
        if change.batch > batch:
            keys |= {each.key: each.before for each in change.keys}
    return keys


def _flat(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the values of nested mappings, and of lists of mappings, by dotted key."""
    if isinstance(tree, dict) and tree:
        for name, item in tree.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for place, item in enumerate(tree):
            yield from _flat(item, f"{prefix}[{place}]")
    else:
        yield prefix, tree


def read_changes(folder: Path) -> list[Change]:
    """Reads the changes of a run, in the order in which they were made; none if there is no file.

    Raises:
        UserError: if the file is damaged.
    """
    file = folder / CHANGES_FILE
    if not file.is_file():
        return []
    try:
        trees = json.loads(file.read_bytes())
        return [
            Change(**{**tree, "keys": tuple(KeyChange(**change) for change in tree["keys"])})
            for tree in trees
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__})",
            remedy="restore it, or remove it: the run trains without it, but its changes are then not known",
        ) from None


def write_changes(folder: Path, changes: Sequence[Change]) -> None:
    """Writes all changes of a run, atomically.

    Raises:
        OSError: if the disk is full.
    """
    write_json(folder / CHANGES_FILE, [asdict(change) for change in changes])


def add_change(folder: Path, change: Change) -> None:
    """Adds a change to a run; a start that was ended before its recipe was kept has added it already."""
    before = read_changes(folder)
    if before and (before[-1].batch, before[-1].keys) == (change.batch, change.keys):
        return
    write_changes(folder, [*before, change])


def fork_of(changes: Sequence[Change]) -> Change | None:
    """Returns the change by which a run was forked; None if it began by itself."""
    return next((change for change in reversed(changes) if change.fork_of), None)
