"""Scores of a suite: equal to those computed by hand, and no incomplete category is averaged away."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from train.evaluate.suite import (
    Suite,
    Task,
    TaskKind,
    load_suite,
    score,
    select,
)
from train.evaluate.task_files import check_task_file, missing_files, require_files
from train.recipe.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
GAUNTLET = ROOT / "yamls/suites/gauntlet.yaml"
DATA = ROOT.parent / "shared/gauntlet"


def _task(category: str, baseline: float) -> Task:
    return Task(category=category, kind=TaskKind.multiple_choice, file="x.jsonl", shots=0, baseline=baseline)


SUITE = Suite("s", {"a": _task("one", 0.5), "b": _task("one", 0.0), "c": _task("two", 0.25)})


def test_scores_by_hand() -> None:
    scores = score(SUITE, {"a": 0.75, "b": 0.1, "c": 0.1})
    assert scores.tasks == pytest.approx({"a": 0.5, "b": 0.1, "c": -0.2})
    assert scores.categories == pytest.approx({"one": 0.3, "two": -0.2})
    # Averaged over categories; averaging over tasks would give 0.4 / 3.
    assert scores.average == pytest.approx(0.05)


def test_a_category_that_lacks_a_task_has_no_score_and_the_whole_has_no_average() -> None:
    scores = score(SUITE, {"a": 0.75, "c": 0.5})
    assert scores.missing == {"one": ["b"]}
    assert set(scores.categories) == {"two"}
    assert scores.average is None


def test_files_that_are_missing_are_an_error_that_names_tasks_and_categories(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"query": "q", "choices": ["a"], "gold": 0}\n')
    lacking = Suite("s", SUITE.tasks | {"d": Task("two", TaskKind.schema, "gone/d.jsonl", 0, 0.5)})
    with pytest.raises(UserError, match=r"lacks d \(two: gone/d.jsonl\)"):
        require_files(lacking, select(lacking, []), tmp_path)
    require_files(lacking, select(lacking, ["c", "a"]), tmp_path)
    assert select(lacking, ["c", "a"]) == ["a", "c"]
    with pytest.raises(UserError, match="has no task 'e'"):
        select(lacking, ["e"])


@pytest.mark.parametrize(
    ("line", "complaint"), [("baseline: 1", "baseline"), ("shot: 3", "shot"), ("kind: essay", "kind")]
)
def test_a_mistake_in_a_suite_names_file_and_key(tmp_path: Path, line: str, complaint: str) -> None:
    fields = {"category": "c", "kind": "schema", "file": "f", "shots": "0", "baseline": "0"}
    key, _, value = line.partition(": ")
    fields[key] = value
    text = "".join(f"    {name}: {field}\n" for name, field in fields.items())
    (tmp_path / "suite.yaml").write_text(f"name: s\ntasks:\n  a:\n{text}")
    with pytest.raises(UserError, match=rf"suite.yaml: .*{complaint}"):
        load_suite(tmp_path / "suite.yaml")


def test_the_gauntlet_is_the_published_one() -> None:
    suite = load_suite(GAUNTLET)
    sizes = {category: len(names) for category, names in suite.categories.items()}
    assert sizes == {
        "world_knowledge": 6,
        "commonsense_reasoning": 7,
        "language_understanding": 4,
        "symbolic_problem_solving": 8,
        "reading_comprehension": 6,
    }
    assert len(suite.tasks) == 31
    assert {suite.tasks[name].shots for name in ("arc_challenge", "jeopardy", "triviaqa_sm_sub")} == {3}
    assert sum(task.baseline for task in suite.tasks.values()) == pytest.approx(8 * 0.5 + 11 * 0.25)


@pytest.mark.skipif(not DATA.is_dir(), reason="the Gauntlet's files are not here")
def test_26_of_the_31_files_are_there() -> None:
    suite = load_suite(GAUNTLET)
    assert missing_files(suite, select(suite, []), DATA) == [
        "mmlu",
        "hellaswag",
        "bigbench_elementary_math_qa",
        "squad",
        "coqa",
    ]


SOUND: dict[TaskKind, dict[str, Any]] = {
    TaskKind.multiple_choice: {"query": "What is it?", "choices": ["yes", "no"], "gold": 0},
    TaskKind.schema: {"context_options": ["The cat", "The dog"], "continuation": "ran", "gold": 1},
    TaskKind.language_modeling: {"context": "The cat", "continuation": "ran"},
    TaskKind.generation: {"context": "2 + 2 =", "answer": "4", "aliases": ["four", "(a"]},
}
TEXTS = {
    TaskKind.multiple_choice: ("query",),
    TaskKind.schema: ("continuation",),
    TaskKind.language_modeling: ("context", "continuation"),
    TaskKind.generation: ("context", "answer"),
}
LISTS = {
    TaskKind.multiple_choice: "choices",
    TaskKind.schema: "context_options",
    TaskKind.generation: "aliases",
}


def unsound(kind: TaskKind) -> Iterator[tuple[str, object]]:
    """Yields damaged lines of a kind of task, each with the key to be named."""
    good = SOUND[kind]
    for key in TEXTS[kind]:
        for text in ("", " \t", None, 7, ["a"], "x <|pad|>", "<|endoftext|>"):
            yield key, good | {key: text}
        yield key, {name: value for name, value in good.items() if name != key}
    if key := LISTS.get(kind):
        for texts in ("ab", {"0": "a"}, None, ["a", ""], ["a", None], ["a", " <|pad|>"]):
            yield key, good | {key: texts}
    if "gold" in good:
        for gold in (7, -1, 2, "no", "0", None, 0.0, True, [0]):
            yield "gold", good | {"gold": gold}
        yield "gold", {name: value for name, value in good.items() if name != "gold"}


@pytest.mark.parametrize("kind", TaskKind)
def test_an_unsound_question_is_named_by_file_line_and_key(tmp_path: Path, kind: TaskKind) -> None:
    file, task = tmp_path / "t.jsonl", Task(category="", kind=kind, file="t.jsonl", shots=0, baseline=0.0)
    good = json.dumps(SOUND[kind])
    file.write_text(f"{good}\n\n{good}")
    check_task_file(file, task)
    for key, row in unsound(kind):
        file.write_text(f"{good}\n\n{json.dumps(row)}\n{good}\n")
        with pytest.raises(UserError) as raised:
            check_task_file(file, task)
        line = str(raised.value)
        assert line.startswith(f"{file}: line 3: {key}: ") and "\n" not in line, (row, line)
    for content in (b"{", b"[]", b"7", b"\xff", good.encode()[:-1], b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(UserError, match="line 1: is not"):
            check_task_file(file, task)
    file.write_text("\n\n")
    with pytest.raises(UserError, match="has no question"):
        check_task_file(file, task)
    file.write_text(f"{good}\n")
    with pytest.raises(UserError, match="line 1: category: is missing"):
        check_task_file(file, dataclasses.replace(task, by_category=True))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: s\ntasks: {../../x: TASK}", "the name '../../x' has a slash"),
        ("name: ../s\ntasks: {a: TASK}", "the name '../s' has a slash"),
        ("name: s\ntasks: {.a: TASK}", "the name '.a' begins with a dot"),
        ("name: s\ntasks: {-a: TASK}", "the name '-a' begins with a dash, as an option of a command does"),
        ("name: s\ntasks: {a: {category: b/c, FIELDS}}", "the name 'b/c' has a slash"),
        ("name: s\ntasks: {a: {category: b, file: ../t.jsonl, KIND}}", "is ../t.jsonl, outside the"),
        ("name: s\ntasks: {a: {category: b, file: /t.jsonl, KIND}}", "is /t.jsonl, outside the"),
    ],
)  # fmt: skip
def test_names_of_a_suite_stay_in_their_folders(tmp_path: Path, text: str, line: str) -> None:
    text = text.replace("TASK", "{category: b, FIELDS}").replace("FIELDS", "file: t.jsonl, KIND")
    text = text.replace("KIND", "kind: schema, shots: 0, baseline: 0")
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_suite(tmp_path / "suite.yaml")
    assert line in str(raised.value) and str(raised.value).startswith(f"{tmp_path}/suite.yaml: ")
