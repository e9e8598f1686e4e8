"""The harness runs what it is given, tells every row and failure, and exits with the verdict."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.verify.forked_ranks import RankError
from launch.verify.harness import ONE, Check, Row, TableCheck, Workspace, run_checks
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe

YAMLS = Path(__file__).resolve().parents[3] / "yamls"


class Given(TableCheck):
    """Gives the rows that it was made with, then fails if it was told to."""

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


def run(
    recipe: Recipe, *checks: Check[Row], json_file: str | None = "f.json", html: str | None = None
) -> int:
    return run_checks(recipe, checks, json_file, html)


def test_a_check_that_holds_has_status_0_and_its_own_figures(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, Given("resume", [good(), good()])) == 0
    told = json.loads(Path("f.json").read_text())
    assert list(told) == ["recipe", "steps", "seconds", "passed", "rows"]
    row = {"what": "kill -9", "layout": "(1,1,1)", "figures": "all equal", "violations": []}
    assert told["passed"] is True and told["rows"] == [row] * 2
    assert "all equal" in Path("resume-smoke.html").read_text()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[-1] == "pass: resume: 2 of 2 rows passed in 0 s; resume-smoke.html"


def test_every_violation_is_told_and_the_other_checks_are_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Given("resume", [good(), bad()]), Given("faults", [good()])]
    assert run(recipe, *checks, html="page.html") == 1
    complaint = capsys.readouterr().err.splitlines()
    assert complaint == [
        "FAIL: resume: reshard (1,2,2): the data log differs",
        "FAIL: resume: reshard (1,2,2): weights differ",
    ]
    told = json.loads(Path("f.json").read_text())
    assert told["passed"] is False
    assert [figures["passed"] for figures in told["checks"].values()] == [False, True]
    assert Path("page-resume.html").is_file() and Path("page-faults.html").is_file()


def test_a_check_that_cannot_go_on_has_failed_and_the_next_one_is_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Given("faults", [good()], "Traceback\nrank 1 was killed"), Given("export", [good()])]
    assert run(recipe, *checks) == 1
    told = json.loads(Path("f.json").read_text())["checks"]
    assert told["faults"]["error"].endswith("rank 1 was killed") and not told["faults"]["passed"]
    assert told["export"]["passed"] and "error" not in told["export"]
    assert "rank 1 was killed" in capsys.readouterr().err


def test_a_check_without_rows_has_not_passed(recipe: Recipe) -> None:
    assert run(recipe, Given("export", []), json_file=None) == 1


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
