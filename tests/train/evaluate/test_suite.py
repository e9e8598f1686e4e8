"""Scores of a suite: equal to those computed by hand, and no incomplete category is averaged away."""

from pathlib import Path

import pytest

from train.evaluate.suite import (
    Suite,
    Task,
    TaskKind,
    load_suite,
    missing_files,
    require_files,
    score,
    select,
)
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
    (tmp_path / "x.jsonl").write_text("{}\n")
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
