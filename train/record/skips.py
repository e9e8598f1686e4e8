"""A run's excluded ranges: those of its recipe and those that its guard decided on.

The recipe's are ``data.skips``. The guard's are in the run's ``skips.json``, written before the run ends for
a rollback and never shortened: every resumption reads it and so repeats the same decisions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.recipe.curriculum import Skip
from train.recipe.errors import UserError
from train.recipe.schema import Recipe
from train.record.files import write_json
from train.record.run_folder import SKIPS_FILE


@dataclass(frozen=True)
class GuardDecision:
    """A rollback decision of the guard, as recorded in ``skips.json``."""

    first_position: int
    end_position: int
    """Position after the last excluded one."""
    step: int
    """The step that raised the alarm, from 1."""
    alarms: list[str]
    documents: list[dict[str, Any]] = field(default_factory=list)
    """Documents that the step read, as in ``alarms.jsonl``."""


def read_decisions(folder: Path) -> list[GuardDecision]:
    """Reads the guard's decisions in a run so far, in the order in which they were made.

    Raises:
        UserError: if the file is damaged.
    """
    file = folder / SKIPS_FILE
    if not file.is_file():
        return []
    try:
        return [GuardDecision(**tree) for tree in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} can't be read: {error}", remedy="restore it: the run can't be reproduced without it"
        ) from None


def write_decisions(folder: Path, decisions: Sequence[GuardDecision]) -> None:
    """Writes all decisions of a run, atomically.

    Raises:
        OSError: if the disk is full.
    """
    write_json(folder / SKIPS_FILE, [asdict(decision) for decision in decisions])


def declared_skips(recipe: Recipe, folder: Path) -> tuple[Skip, ...]:
    """Returns all excluded ranges of a run: the recipe's first, then the guard's decisions.

    Raises:
        UserError: if the record can't be read.
    """
    of_recipe = [Skip(skip.first_position, skip.end_position, skip.reason) for skip in recipe.data.skips]
    of_guard = [
        Skip(each.first_position, each.end_position, f"rolled back at step {each.step}: {each.alarms[-1]}")
        for each in read_decisions(folder)
    ]
    return *of_recipe, *of_guard


def names_of(documents: Sequence[dict[str, Any]], most: int = 4) -> str:
    """Names a few of a step's documents, those with the most tokens first."""
    tokens: dict[str, int] = {}
    for piece in documents:
        if "document" in piece:
            name = f"{piece['domain']}: {piece['document']}"
            tokens[name] = tokens.get(name, 0) + piece["tokens"]
    names = sorted(tokens, key=lambda name: -tokens[name])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
