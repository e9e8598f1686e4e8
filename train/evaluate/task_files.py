"""The files of a suite's tasks, checked before any model is built.

Needs no torch.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.evaluate.suite import Suite, Task, TaskKind, load_suite, select
from train.recipe.errors import UserError
from train.recipe.schema import Recipe

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|endofprompt|>",
)
"""Names of special tokens: in a question's text they would be read as the tokens, padding for example."""


def check_suite(recipe: Recipe, file: str) -> None:
    """Raises if a recipe's suite is invalid, lacks a file, or has one that is unsound.

    Raises:
        UserError: one line that names file, key and remedy.
    """
    evaluation = recipe.evaluation
    if evaluation.suite is None:
        return
    assert evaluation.suite_data is not None, "validate() must be called first"
    suite = load_suite(Path(evaluation.suite))
    try:
        require_files(suite, select(suite, evaluation.suite_tasks), Path(evaluation.suite_data))
    except UserError as error:
        if error.file:
            raise
        raise UserError(
            f"{error.key} {error.what}", key="evaluation.suite_tasks", remedy=error.remedy, file=file
        ) from None


def require_files(suite: Suite, names: Sequence[str], data: Path) -> None:
    """Raises if files of tasks are missing or unsound; called before any model is built.

    Raises:
        UserError: one line with every missing task and its category, or with the first unsound question.
    """
    lacking = missing_files(suite, names, data)
    if lacking:
        listed = ", ".join(
            f"{name} ({suite.tasks[name].category}: {suite.tasks[name].file})" for name in lacking
        )
        raise UserError(
            f"lacks {listed}",
            key=str(data),
            remedy="add them, or select tasks by name: an incomplete category has no score",
        )
    for name in names:
        check_task_file(data / suite.tasks[name].file, suite.tasks[name])


def missing_files(suite: Suite, names: Sequence[str], data: Path) -> list[str]:
    """Returns the tasks whose file is not in the data folder."""
    return [name for name in names if not (data / suite.tasks[name].file).is_file()]


def check_task_file(file: Path, task: Task, special: Collection[str] = SPECIAL_TOKENS) -> None:
    """Checks every question of a task file.

    Args:
        file: JSON lines in LLM Foundry's format.
        task: its settings.
        special: names of the tokenizer's special tokens.

    Raises:
        UserError: one line with file, line and key for the first question that can't be asked or judged.
    """
    count = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    _check_line(line, number, file, task, special)
                    count += 1
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", file=str(file)) from None
    if not count:
        raise UserError("has no question", remedy="remove the task, or give its file", file=str(file))


def _check_line(line: bytes, number: int, file: Path, task: Task, special: Collection[str]) -> None:
    try:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _UnfitError("", f"is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise _UnfitError("", "is not a mapping of keys")
        for key, text in CHECKS[task.kind](row):
            if found := [name for name in special if name and name in text]:
                raise _UnfitError(key, f"contains {found[0]}, the name of a special token")
        if task.by_category and not _is_text(row.get("category")):
            raise _UnfitError("category", "is missing or blank")
    except _UnfitError as unfit:
        key = ": ".join(part for part in (f"line {number}", unfit.key) if part)
        remedy = f"correct or remove that line; docs/evaluation.md has the format of {task.kind.value} tasks"
        raise UserError(unfit.what, key=key, remedy=remedy, file=str(file)) from None


class _UnfitError(ValueError):
    """A question that can't be asked or judged."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key, self.what = key, what


Texts = Iterator[tuple[str, str]]
"""Key and text."""


def _multiple_choice(row: dict[str, Any]) -> Texts:
    yield "query", _text(row, "query")
    yield from _options(row, "choices")


def _schema(row: dict[str, Any]) -> Texts:
    yield from _options(row, "context_options")
    yield "continuation", _text(row, "continuation")


def _language_modeling(row: dict[str, Any]) -> Texts:
    for key in ("context", "continuation"):
        yield key, _text(row, key)


def _generation(row: dict[str, Any]) -> Texts:
    yield "context", _text(row, "context")
    aliases = row.get("aliases", [])
    if not isinstance(aliases, list):
        raise _UnfitError("aliases", "is not a list")
    for key, text in (("answer", row.get("answer")), *(("aliases", alias) for alias in aliases)):
        if not _is_text(text):  # Every text begins with an empty answer.
            raise _UnfitError(key, "is missing, blank or no text")
        yield key, text


CHECKS: dict[TaskKind, Callable[[dict[str, Any]], Texts]] = {
    TaskKind.multiple_choice: _multiple_choice,
    TaskKind.schema: _schema,
    TaskKind.language_modeling: _language_modeling,
    TaskKind.generation: _generation,
}


def _options(row: dict[str, Any], key: str) -> Texts:
    options, gold = row.get(key), row.get("gold")
    if not isinstance(options, list) or not options:
        raise _UnfitError(key, "is not a list of texts")
    for option in options:
        if not _is_text(option):
            raise _UnfitError(key, f"has {option!r}, which is blank or no text")
        yield key, option
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise _UnfitError(
            "gold", f"is {gold!r}, but must be the index, from 0, of one of {len(options)} {key}"
        )


def _text(row: dict[str, Any], key: str) -> str:
    text = row.get(key)
    if not _is_text(text):
        raise _UnfitError(key, "is missing, blank or no text")
    assert isinstance(text, str)
    return text


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
