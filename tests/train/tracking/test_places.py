"""MLflow follows a run that is renamed, tagged or removed; a copy never writes into the original's run."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import MlflowServer
from tests.train.tracking.test_mlflow_upload import facts, write_steps
from train.record.run_folder import RECIPE_FILE
from train.runs.__main__ import main
from train.tracking.__main__ import main as tracking
from train.tracking.facts import RunFacts
from train.tracking.mlflow_upload import Upload
from train.tracking.uploader import collect_facts, store_of

pytestmark = pytest.mark.slow

UID = "ab" * 16


def make(folder: Path, uri: str = "") -> Path:
    """Makes a run of three steps that has been sent."""
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(f"name: {folder.name}\ntraining: {{ duration_tokens: 80 }}\n")
    (folder / "report.html").write_text("<p>old</p>")
    facts(uri, status="FINISHED", experiment=folder.parts[-3], uid=UID).write(folder)
    write_steps(folder, 1, 3)
    assert Upload(folder).sync() == 9
    return folder


def runs_at(upload: Upload) -> dict[str, Any]:
    """Returns the runs of an upload's experiment by name."""
    client = upload._client
    found = client.search_runs([client.get_experiment_by_name(upload.facts.experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def steps_of(client: Any, run: Any) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "Loss/train"))


def test_names_tags_and_removal_reach_mlflow(
    mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.runs.operations.write_report", lambda folder: None)
    run_id = Upload(make(mlflow_folder / "runs/a")).state.run_id
    assert main(["tag", "a", "owner=me", "old=1"]) == 0
    assert main(["rename", "a", "b"]) == 0
    assert main(["tag", "b", "old-", "c++=x"]) == 0
    client = Upload(mlflow_folder / "runs/b")
    client.sync()
    (name, run), *rest = runs_at(client).items()
    assert (name, run.info.run_id, rest) == ("b", run_id, [])
    assert run.data.tags["owner"] == "me" and "old" not in run.data.tags
    assert [value for key, value in run.data.tags.items() if key.startswith("c__-")] == ["x"]
    assert main(["copy", "b", "c"]) == 0
    both = runs_at(client)
    assert both.keys() == {"b", "c"} and steps_of(client._client, both["c"]) == [1, 2, 3]
    assert both["c"].data.tags["finegrain.copy_of"] == UID
    assert main(["rm", "c", "--yes"]) == 0 and main(["rm", "b", "--yes", "--keep-mlflow"]) == 0
    assert runs_at(client).keys() == {"b"}
    assert client._client.get_run(both["c"].info.run_id).info.lifecycle_stage == "deleted"
    assert f"mlflow runs restore --run-id {both['c'].info.run_id}" in capsys.readouterr().out


def test_with_the_server_down_the_folder_is_changed_and_mlflow_later(
    mlflow_folder: Path,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("train.runs.operations.write_report", lambda folder: None)
    with mlflow_server:
        make(mlflow_folder / "runs/down", mlflow_server.uri)
    assert main(["rename", "down", "up"]) == 0
    said = capsys.readouterr().out
    assert f"tracking: {mlflow_server.uri} does not accept it (" in said
    assert "later: python -m train.tracking upload runs/up" in said
    with mlflow_server:
        assert tracking(["upload", "runs/up"]) == 0, capsys.readouterr()
        upload = Upload(mlflow_folder / "runs/up")
        upload.sync()
        assert runs_at(upload).keys() == {"up"}
    assert main(["rm", "up", "--yes"]) == 0
    assert "delete the run up on its page" in capsys.readouterr().out


@pytest.mark.parametrize("is_served", [True, False])
def test_a_copied_folder_is_another_run(
    mlflow_folder: Path, mlflow_server: MlflowServer, is_served: bool
) -> None:
    """Whether only the run was copied or all runs, and whether its records are sent or training continues."""
    with mlflow_server:
        uri = mlflow_server.uri if is_served else ""
        old = make(mlflow_folder / "runs/old", uri)
        shutil.copytree(old, mlflow_folder / "runs/copy")
        assert not any(str(mlflow_folder) in file.read_text() for file in old.iterdir())
        write_steps(mlflow_folder / "runs/copy", 1, 5, offset=0.5)
        copied = Upload(mlflow_folder / "runs/copy")
        copied.sync()
        found = runs_at(copied)
        assert {name: steps_of(copied._client, run) for name, run in found.items()} == {
            "old": [1, 2, 3],
            "copy": [1, 2, 3, 4, 5],
        }
        # Sent again, renamed and moved, they stay what they are.
        for name in ("old", "copy"):
            assert Upload(mlflow_folder / "runs" / name).sync() == 0
        (mlflow_folder / "runs/copy").rename(mlflow_folder / "runs/moved")
        moved = Upload(mlflow_folder / "runs/moved")
        moved.sync()
        assert runs_at(moved)["moved"].info.run_id == found["copy"].info.run_id
        uids = {name: RunFacts.read(mlflow_folder / "runs" / name).uid for name in ("old", "moved")}
        assert uids["old"] == UID != uids["moved"]


def test_a_copied_embedded_store_leads_to_its_own_artifacts(mlflow_folder: Path) -> None:
    """All runs with their store: they stay the same runs there, and nothing leads back."""
    old = make(mlflow_folder / "runs/old")
    shutil.copytree(mlflow_folder / "runs", mlflow_folder / "other")
    here = mlflow_folder / "other/old"
    (here / "report.html").write_text("<p>new</p>")
    # Another process, since MLflow remembers in this one where a run's artifacts are.
    words = [sys.executable, "-m", "train.tracking", "upload", str(here)]
    subprocess.run(words, cwd=Path(__file__).resolve().parents[3], check=True)
    upload = Upload(here)
    assert upload.sync() == 0
    (run,) = runs_at(upload).values()
    assert run.info.run_id == Upload(old).state.run_id == upload.state.run_id
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(mlflow_folder / "other")
    reports = {file: file.read_text() for file in mlflow_folder.rglob("mlflow-artifacts/**/report.html")}
    assert {str(file.relative_to(mlflow_folder)).split("/")[0]: text for file, text in reports.items()} == {
        "runs": "<p>old</p>",
        "other": "<p>new</p>",
    }
    experiment = upload._client.get_experiment_by_name(upload.facts.experiment)
    assert experiment.artifact_location == (mlflow_folder / "other/mlflow-artifacts").as_uri()
    assert store_of(here, upload.facts) == f"sqlite:///{mlflow_folder / 'other/mlflow.db'}"


def test_a_start_in_a_copied_folder_is_another_run(mlflow_folder: Path, tiny_recipe: Any) -> None:
    old = make(mlflow_folder / "runs/old")
    shutil.copytree(old, mlflow_folder / "runs/copy")
    recipe = tiny_recipe(mlflow_folder / "runs", mlflow_folder / "s", "copy")
    assert collect_facts(mlflow_folder / "runs/copy", recipe, [], "", {}).uid != UID
    assert collect_facts(old, recipe, [], "", {}).uid == UID
    assert not (mlflow_folder / "runs/copy/mlflow.json").exists()
