"""The harness runs the given checks, reports every row and failure, and returns the verdict as status."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.verify.forked_ranks import RankError
from launch.verify.harness import ONE, Check, Row, TableCheck, Workspace, run_checks
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


class Given(TableCheck):
    """Yields the given rows, then raises the given error, if there is one."""

    title, text = "Given", "Rows of a test."

    def __init__(self, name: str, rows: list[Row], error: str = "") -> None:
        super().__init__()
        self.name = self.page = name
        self.given, self.ends_with = rows, error

    def run(self, workspace: Workspace) -> Iterator[Row]:
        """Returns the rows."""
        assert workspace.folder.is_dir()
        yield from self.given
        if self.ends_with:
            raise RankError(self.ends_with)


def good() -> Row:
    return Row("kill -9", "(1,1,1)", "all equal")


def bad() -> Row:
    return Row("reshard", "(1,2,2)", "not equal", ["the data log differs", "weights differ"])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return load_recipe(YAMLS / "smoke.yaml")


def run(recipe: Recipe, *checks: Check[Row], html: str | None = None) -> tuple[int, Any]:
    found = run_checks(recipe, checks, html)
    return found.status, json.loads(json.dumps(found.tree))


def test_a_check_that_holds_has_status_0_and_its_own_figures(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    status, figures = run(recipe, Given("resume", [good(), good()]))
    assert status == 0
    assert list(figures) == ["recipe", "steps", "seconds", "passed", "rows"]
    row = {"what": "kill -9", "layout": "(1,1,1)", "figures": "all equal", "violations": []}
    assert figures["passed"] is True and figures["rows"] == [row] * 2
    assert "all equal" in Path("resume-smoke.html").read_text()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[-1] == "pass: resume: 2 of 2 rows passed in 0 s; resume-smoke.html"


def test_every_violation_is_reported_and_the_other_checks_are_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Given("resume", [good(), bad()]), Given("faults", [good()])]
    status, figures = run(recipe, *checks, html="page.html")
    assert status == 1
    complaint = capsys.readouterr().err.splitlines()
    assert complaint == [
        "FAIL: resume: reshard (1,2,2): the data log differs",
        "FAIL: resume: reshard (1,2,2): weights differ",
    ]
    assert figures["passed"] is False
    assert [each["passed"] for each in figures["checks"].values()] == [False, True]
    assert Path("page-resume.html").is_file() and Path("page-faults.html").is_file()


def test_a_check_that_cannot_continue_has_failed_and_the_next_one_is_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Given("faults", [good()], "Traceback\nrank 1 was killed"), Given("export", [good()])]
    status, figures = run(recipe, *checks)
    figures = figures["checks"]
    assert status == 1
    assert figures["faults"]["error"].endswith("rank 1 was killed") and not figures["faults"]["passed"]
    assert figures["export"]["passed"] and "error" not in figures["export"]
    assert "rank 1 was killed" in capsys.readouterr().err


def test_a_check_without_rows_has_not_passed(recipe: Recipe) -> None:
    assert run(recipe, Given("export", []))[0] == 1


def test_a_run_that_nothing_disturbs_is_trained_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(small: Recipe, layout: object) -> Path:
        trained.append(layout)
        return tmp_path / str(layout)

    monkeypatch.setattr("launch.verify.harness.uninterrupted", train)
    workspace = Workspace(recipe, tmp_path)
    for layout in (ONE, workspace.pair, ONE):
        assert workspace.uninterrupted(layout) == tmp_path / str(layout)
    assert trained == [ONE, workspace.pair]


@pytest.mark.parametrize(("stem", "pair"), [("smoke", "(1,1,2)"), ("mpt-7b", "(1,2,1)")])
def test_the_pair_shares_experts_where_there_are_any(stem: str, pair: str, tmp_path: Path) -> None:
    assert str(Workspace(load_recipe(YAMLS / f"{stem}.yaml"), tmp_path).pair) == pair
