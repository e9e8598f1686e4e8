"""Runs are listed, compared, renamed, copied, removed and tagged by their folders, without MLflow."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.train.start.test_damage import small_run
from train.recipe.reading import load_recipe
from train.record.changes import Change, KeyChange, write_changes
from train.record.lease import Holder
from train.record.process import host_name, pid_space, process_start
from train.record.run_folder import claim_run_folder, in_place
from train.runs.__main__ import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `r` of 30 steps."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    small_run(runs)
    return runs


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def take(folder: Path) -> None:
    """Makes a run one that the process which started the tests trains in."""
    pid = os.getppid()
    holder = Holder(host_name(), pid, pid_space(), process_start(pid) or 0, "now", "token")
    (folder / "lease/000009.json").write_text(json.dumps(asdict(holder)))


@pytest.mark.parametrize(
    ("tag", "error"),
    [
        ("a=" + "x" * 5001, "the value of a tag has 5,001 characters; give 5,000 at most"),
        ("a" * 251, "the name of a tag has 251 characters; give 250 at most"),
        ("a=b\nc", r"'b\nc' has a control character; give a value of one line"),
        ("=x", "'' is no name for a tag; use another one"),
    ],
)
def test_tags_that_mlflow_would_not_take_are_refused(
    tag: str, error: str, runs: Path, capsys: Output
) -> None:
    assert main(["tag", "r", "kept=1", tag]) == 2
    assert error in capsys.readouterr().err
    assert not (runs / "r/tags.json").exists()


def test_list_show_and_tag(runs: Path, capsys: Output) -> None:
    shutil.copytree(runs / "r", runs / "fork")
    write_changes(
        runs / "fork",
        [Change(10, 2560, "then", "fork", "runs/r", (KeyChange("seed", 1, 2), KeyChange("x", None, 3)))],
    )
    (runs / "torn").mkdir()
    (runs / "torn/recipe.yaml").write_text("{")
    (runs / "no run").mkdir()
    take(runs / "fork")
    assert main(["tag", "r", "owner=me", "note=a b", "old"]) == 0
    assert main(["tag", "runs/r", "old-", "note=c"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["note=c", "owner=me"]
    assert main(["list", "--json", "list.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "state", "batches", "tokens"] and len(lines) == 4
    words = {line.split()[0]: line.split() for line in lines[1:]}
    assert words["r"][1:6] == ["stopped", "30", "7.68k", "75%", "0.033"]
    assert words["fork"][1] == "training" and words["torn"][1] == "damaged"
    assert "note=c, owner=me" in lines[2] and "fork of runs/r at batch 10" in lines[1]
    found = {run["name"]: run for run in json.loads(Path("list.json").read_bytes())}
    assert found["r"]["checkpoints"] == [10, 20] and found["r"]["tags"] == {"note": "c", "owner": "me"}
    assert main(["tag", "r", "why=" + "long" * 1000]) == 0
    capsys.readouterr()
    assert main(["list", "--tag", "why"]) == 0
    assert f"why={'long' * 8}lon…" in (line := capsys.readouterr().out.splitlines()[1]) and len(line) < 200
    assert main(["tag", "r", "why-"]) == 0
    capsys.readouterr()
    assert main(["list", "--tag", "owner=me"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["show", "fork"]) == 0
    shown = capsys.readouterr().out
    assert "fork of" in shown and "10, 20" in shown and f"process {os.getppid()}" in shown
    assert shown.splitlines()[-2].split() == ["10", "then", "seed", "1", "2"]
    for words_, expected in (
        (["show", "q"], "there is no run q, neither as a folder nor in runs"),
        (["list", "--runs-dir", "q"], "--runs-dir: q is no folder"),
        (["tag", "r", "mlflow.user=x"], "'mlflow.user' is no name for a tag"),
        (["tag", "r", "none-"], "r has no tag none"),
    ):
        assert main(words_) == 2
        assert expected in capsys.readouterr().err


def test_diff_names_the_keys_and_figures_that_differ(runs: Path, capsys: Output) -> None:
    shutil.copytree(runs / "r", runs / "s")
    file = runs / "s/recipe.yaml"
    text = file.read_text().replace("learning_rate: 0.003", "learning_rate: 0.001")
    file.write_text(text.replace("clip_norm: 1.0", "clip_norm: null").replace("name: r", "name: s"))
    assert main(["diff", "r", "s", "--json", "diff.json"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        ["key", "r", "s"],
        ["optimizer.learning_rate", "0.003", "0.001"],
        ["training.clip_norm", "1.0", "null"],
    ]
    assert ["batches", "30", "30"] in lines
    assert [each["key"] for each in json.loads(Path("diff.json").read_bytes())["keys"]] == [
        "optimizer.learning_rate",
        "training.clip_norm",
    ]
    assert main(["diff", "r", "r"]) == 0
    assert capsys.readouterr().out.startswith("the recipes are equal")


def test_rename_copy_and_rm(runs: Path, capsys: Output) -> None:
    before = (runs / "r/recipe.yaml").read_text()
    assert main(["rename", "r", "better"]) == 0
    assert capsys.readouterr().out == "runs/better\n" and not (runs / "r").exists()
    assert (runs / "better/recipe.yaml").read_text() == before.replace("name: r", 'name: "better"')
    uid = json.loads((runs / "better/tracking.json").read_bytes())["uid"]
    assert main(["copy", "better", "twin"]) == 0
    assert load_recipe(runs / "twin/recipe.yaml").name == "twin"
    facts = json.loads((runs / "twin/tracking.json").read_bytes())
    assert facts["uid"] != uid and facts["tags"]["finegrain.copy_of"] == uid
    for name in ("metrics.jsonl", "checkpoints/batch-00000020/manifest.json"):
        assert (runs / "twin" / name).read_bytes() == (runs / "better" / name).read_bytes()
    # Either resumes as itself.
    recipe = replace(load_recipe(runs / "twin/recipe.yaml"), runs_dir="runs")
    assert claim_run_folder(recipe).folder == Path("runs/twin")
    assert main(["rm", "better"]) == 2
    assert "better would be removed for good; say so with --yes" in capsys.readouterr().err
    assert main(["rm", "better", "--yes"]) == 0
    assert sorted(path.name for path in runs.iterdir()) == ["twin"]


def test_a_run_that_is_alive_is_neither_renamed_nor_removed(runs: Path, capsys: Output) -> None:
    take(runs / "r")
    before = sorted(runs.rglob("*"))
    for words in (["rename", "r", "s"], ["rm", "r", "--yes"], ["copy", "r", "s"]):
        assert main(words) == 2
        assert f"runs/r is in use by process {os.getppid()} on" in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["r", "../s"], "is not a folder name: it has a slash"), (["r", "other"], "runs/other exists")],
)
def test_a_name_that_is_taken_or_none_is_refused(
    runs: Path, capsys: Output, words: list[str], expected: str
) -> None:
    (runs / "other").mkdir()
    for command in ("rename", "copy"):
        assert main([command, *words]) == 2
        assert expected in capsys.readouterr().err
    assert (runs / "r/recipe.yaml").is_file()


def test_a_linked_run_is_renamed_and_removed(runs: Path) -> None:
    (runs / "r").rename(runs.parent / "disk")
    (runs / "r").symlink_to(runs.parent / "disk")
    assert main(["rename", "r", "s"]) == 0
    assert (runs / "s").is_symlink() and load_recipe(runs / "s/recipe.yaml").name == "s"
    assert main(["rm", "s", "--yes"]) == 0
    assert not (runs / "s").is_symlink() and not (runs.parent / "disk").exists()


def test_the_recipe_of_a_moved_folder_is_that_of_its_new_place(runs: Path) -> None:
    shutil.copytree(runs, "elsewhere/runs")
    file = Path("elsewhere/runs/r/recipe.yaml")
    recipe = load_recipe(file)
    assert recipe.runs_dir == str(made_dir(runs))
    assert in_place(recipe, file, []).runs_dir == "elsewhere/runs"
    named = in_place(replace(recipe, name="n"), file, ["name=n"])
    assert (named.name, named.runs_dir) == ("n", "elsewhere/runs")
    (runs / "r").rename(runs / "t")
    assert in_place(recipe, Path("runs/t/recipe.yaml"), []).name == "t"
    Path("mine").mkdir()
    shutil.copy(file, "mine/recipe.yaml")
    assert in_place(recipe, Path("mine/recipe.yaml"), []) == recipe


def made_dir(runs: Path) -> str:
    """Returns the folder that the run's recipe was written with."""
    return str(load_recipe(runs / "r/recipe.yaml").runs_dir)
