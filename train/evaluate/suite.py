"""Suites of in-context learning tasks, such as Mosaic's Gauntlet, and their scores. Needs no torch.

A task's accuracy is rescaled so that guessing gives 0 and perfection 1. Tasks have equal weight in their
category, and categories in the average (LLM Foundry's Gauntlet with EQUAL weighting). An incomplete category
has no score, and neither has the average; LLM Foundry drops such a category and averages the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.recipe.errors import UserError
from train.recipe.names import unfit_as_file
from train.recipe.secrets import guarded_environment
from train.record import metrics


class TaskKind(str, Enum):
    """The kind of a task."""

    multiple_choice = "multiple_choice"
    schema = "schema"
    language_modeling = "language_modeling"
    generation = "generation"


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    category: str = MISSING
    """Category to which the task counts; empty: none, the task is only reported."""
    kind: TaskKind = MISSING
    """`multiple_choice`: the most likely per token of several continuations; `schema`: of several contexts;
    `language_modeling`: greedy decoding gives the continuation; `generation`: greedy text begins with an
    answer."""
    file: str = MISSING
    """JSON lines below the data folder, in LLM Foundry's format."""
    shots: int = MISSING
    """Examples with answers before each question, drawn from the same file."""
    baseline: float = MISSING
    """Accuracy of guessing."""
    continuation_delimiter: str = " "
    """Text between question and answer."""
    prelimiter: str = ""
    """Text before each question."""
    cot_delimiter: str = ""
    """Text between reasoning and answer, in answers that have both."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a generated answer."""
    normalize: bool = True
    """Compare generated answers in lower case, without articles and punctuation."""
    by_category: bool = False
    """Split the file by its `category`: shots come from the same category, and categories have equal
    weight."""


@dataclass(frozen=True)
class Suite:
    """A named set of tasks."""

    name: str = MISSING
    tasks: dict[str, Task] = field(default_factory=dict)

    @property
    def categories(self) -> dict[str, list[str]]:
        """Names of the tasks of each category, in the file's order."""
        found: dict[str, list[str]] = {}
        for name, task in self.tasks.items():
            if task.category:
                found.setdefault(task.category, []).append(name)
        return found


@dataclass(frozen=True)
class Scores:
    """The scores of a suite."""

    tasks: dict[str, float]
    """Rescaled accuracy of each task."""
    categories: dict[str, float]
    """Mean of each complete category."""
    average: float | None
    """Mean of all categories; None if one is incomplete."""
    missing: dict[str, list[str]]
    """Missing tasks by category."""


def as_metrics(scores: Scores) -> dict[str, float]:
    """Returns scores under the keys of the run's record."""
    found = {metrics.EVALUATION_TASK.replace("TASK", name): value for name, value in scores.tasks.items()}
    for name, value in scores.categories.items():
        found[metrics.EVALUATION_CATEGORY.replace("CATEGORY", name)] = value
    if scores.average is not None:
        found[metrics.EVALUATION_AVERAGE] = scores.average
    return found


@guarded_environment()
def load_suite(path: Path) -> Suite:
    """Reads a suite.

    Raises:
        UserError: for an unknown key, a wrong type, or an impossible number.
    """
    if not path.is_file():
        raise UserError("no such suite", remedy="yamls/suites/gauntlet.yaml is one", file=str(path))
    try:
        suite = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Suite), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__.at(str(path)) from None
        key = str(error.full_key or error.key or "")
        what = str(error).split("\n")[0]
        raise UserError(what, key=key, remedy="see train/evaluate/suite.py", file=str(path)) from None
    assert isinstance(suite, Suite)
    if not suite.tasks:
        raise UserError("is empty", key="tasks", remedy="name at least one task", file=str(path))
    for name in (suite.name, *suite.tasks, *suite.categories):
        if unfit := unfit_as_file(name):
            raise UserError(f"the name {name!r} {unfit}", remedy="use letters and digits", file=str(path))
    for name, task in suite.tasks.items():
        if Path(task.file).is_absolute() or ".." in Path(task.file).parts:
            raise UserError(
                f"is {task.file}, outside the data folder",
                key=f"tasks.{name}.file",
                remedy="name a file below it",
                file=str(path),
            )
        if not 0 <= task.baseline < 1:
            raise UserError(
                f"is {task.baseline}",
                key=f"tasks.{name}.baseline",
                remedy="must lie in [0, 1)",
                file=str(path),
            )
        if task.shots < 0:
            raise UserError(
                f"is {task.shots}", key=f"tasks.{name}.shots", remedy="must not be negative", file=str(path)
            )
    return suite


def select(suite: Suite, names: Sequence[str]) -> list[str]:
    """Returns the names of the selected tasks, in the suite's order; all, if none is named.

    Raises:
        UserError: for a name that the suite does not have.
    """
    for name in names:
        if name not in suite.tasks:
            raise UserError(
                f"has no task {name!r}", key=suite.name, remedy=f"one of {', '.join(suite.tasks)}"
            )
    return [name for name in suite.tasks if not names or name in names]


def score(suite: Suite, accuracies: Mapping[str, float]) -> Scores:
    """Computes the scores of tasks, categories and the suite.

    Args:
        suite: the tasks.
        accuracies: accuracy by task.
    """
    tasks = {
        name: (accuracies[name] - task.baseline) / (1 - task.baseline)
        for name, task in suite.tasks.items()
        if name in accuracies
    }
    missing = {
        category: lacking
        for category, names in suite.categories.items()
        if (lacking := [name for name in names if name not in tasks])
    }
    categories = {
        category: sum(tasks[name] for name in names) / len(names)
        for category, names in suite.categories.items()
        if category not in missing
    }
    average = sum(categories.values()) / len(categories) if categories and not missing else None
    return Scores(tasks, categories, average, missing)


def as_dict(scores: Scores) -> dict[str, Any]:
    """Converts scores to plain values."""
    return {
        "tasks": scores.tasks,
        "categories": scores.categories,
        "average": scores.average,
        "missing": scores.missing,
    }
