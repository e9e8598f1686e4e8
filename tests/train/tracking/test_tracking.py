"""The process that follows a run, and the commands, with MLflow's real store and server."""

import dataclasses
import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.record.step_log import StepLog, read_steps
from train.record.summary import DatasetInput
from train.tracking.__main__ import main
from train.tracking.facts import RunFacts
from train.tracking.mlflow_upload import store_uri
from train.tracking.names import chart_key
from train.tracking.store import exclusive
from train.tracking.uploader import MlflowUploader, flatten

pytestmark = pytest.mark.slow

LOSS = "loss/train"
SMOKE = Path(__file__).parents[3] / "yamls" / "smoke.yaml"


@pytest.fixture
def run_dir(mlflow_folder: Path) -> Path:
    folder = mlflow_folder / "toy"
    folder.mkdir()
    return folder


def toy_recipe(*overrides: str) -> Recipe:
    return load_recipe(SMOKE, ["name=toy", *overrides])


def write_steps(run_dir: Path, first: int, last: int) -> None:
    log = StepLog(run_dir / "metrics.jsonl")
    log.drop_after(first - 1)
    for step in range(first, last + 1):
        log.write(step, {"time": 1e9 + step, LOSS: 1 / step})
    log.close()


def losses_at_server(run_dir: Path, uri: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    history = MlflowClient(tracking_uri=uri).get_metric_history(run_id, chart_key(LOSS))
    return sorted((metric.step, metric.value) for metric in history)


def losses_on_disk(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line[LOSS]) for line in read_steps(run_dir / "metrics.jsonl")]


def wait_for(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def sent_step(run_dir: Path) -> int:
    path = run_dir / "mlflow.json"
    return json.loads(path.read_text())["step"] if path.exists() else -1


def test_server_that_dies_and_comes_back_while_training(
    run_dir: Path, mlflow_server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    uploader = MlflowUploader(run_dir, toy_recipe(f"tracking.uri={mlflow_server.uri}"))
    begun = time.monotonic()
    uploader.start()
    assert time.monotonic() - begun < 0.5
    with mlflow_server:
        write_steps(run_dir, 1, 10)
        wait_for(lambda: sent_step(run_dir) == 10)
    write_steps(run_dir, 11, 20)
    shown = ""

    def is_told() -> bool:
        nonlocal shown
        shown += capfd.readouterr().err
        return "does not accept records" in shown

    wait_for(is_told)
    with mlflow_server:
        assert uploader.finish(timeout_s=30)
        assert losses_at_server(run_dir, mlflow_server.uri) == losses_on_disk(run_dir)
    assert shown.count("\n") == 1
    assert "Connection" in shown
    assert "responds again; 10 waiting values" in capfd.readouterr().err


def test_server_that_hangs_then_upload_by_command(
    run_dir: Path, mlflow_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uploader = MlflowUploader(
            run_dir, toy_recipe(f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}")
        )
        uploader.start()
        write_steps(run_dir, 1, 10)
        begun = time.monotonic()
        assert not uploader.finish(timeout_s=0.5)
        assert time.monotonic() - begun < 5
    assert "later: python -m train.tracking upload toy" in capfd.readouterr().err
    here = f"sqlite:///{mlflow_folder}/mlflow.db"
    sent = mlflow_folder / "sent.json"
    assert main(["upload", str(run_dir), "--uri", here, "--json", str(sent)]) == 0
    assert losses_at_server(run_dir, here) == losses_on_disk(run_dir)
    assert json.loads(sent.read_text())[0]["metric_values_sent"] == 10
    # The new position is kept: a further upload sends nothing twice.
    del os.environ["MLFLOW_TRACKING_URI"]
    assert main(["upload", str(run_dir)]) == 0
    assert "0 metric values sent" in capfd.readouterr().out


def test_killed_training_is_sent_to_its_end_and_marked(run_dir: Path) -> None:
    from mlflow import MlflowClient

    training = os.fork()
    if training == 0:
        MlflowUploader(run_dir, toy_recipe()).start()
        write_steps(run_dir, 1, 10)
        os.kill(os.getpid(), 9)
    os.waitpid(training, 0)
    wait_for(lambda: sent_step(run_dir) == 10)
    with exclusive(run_dir / "mlflow.lock"):  # Released once the process has sent everything.
        uri = store_uri(run_dir)
        assert losses_at_server(run_dir, uri) == losses_on_disk(run_dir)
        run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
        assert MlflowClient(tracking_uri=uri).get_run(run_id).info.status == "FAILED"
    assert RunFacts.read(run_dir).status == "RUNNING"


def test_mlflow_switched_off_can_be_sent_later(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uploader = MlflowUploader(run_dir, toy_recipe("tracking.mlflow=false"))
    uploader.start()
    write_steps(run_dir, 1, 3)
    uploader.finish()
    assert not (run_dir / "mlflow.json").exists()
    assert main(["upload", str(run_dir)]) == 0
    assert "3 metric values sent" in capsys.readouterr().out


def test_facts_say_where_the_run_came_from(run_dir: Path) -> None:
    dataset = DatasetInput("code/train", "ab" * 32, "shards", 10)
    recipe = toy_recipe("tracking.uri=https://me:hush@example.org/mlflow")
    facts = MlflowUploader(run_dir, recipe, [dataset], tags={"mlflow.parentRunId": "1"}).facts
    assert facts.params["model.moe.experts"] == "16"
    assert facts.params["checkpoint.interval_minutes"] == "null"
    assert facts.params["data.domains.code"] == "0.5"
    assert len(facts.tags["mlflow.source.git.commit"].removesuffix("-dirty")) == 40
    assert facts.tags["package.torch"] == version("torch")
    assert facts.tags["mlflow.parentRunId"] == "1"
    assert facts.datasets == [dataset]
    assert facts.uri == facts.params["tracking.uri"] == "https://example.org/mlflow"
    assert "hush" not in json.dumps(dataclasses.asdict(facts))


def test_resumed_run_keeps_its_identity(run_dir: Path) -> None:
    first = MlflowUploader(run_dir, toy_recipe("tracking.mlflow=false"))
    first.start()
    first.finish("FAILED")
    second = MlflowUploader(run_dir, toy_recipe("tracking.mlflow=false"))
    assert second.facts.uid == first.facts.uid
    assert second.facts.status == "RUNNING"


def test_variable_points_elsewhere(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert MlflowUploader(run_dir, toy_recipe()).facts.uri == "http://127.0.0.1:9"
    assert MlflowUploader(run_dir, toy_recipe("tracking.uri=http://127.0.0.1:8")).facts.uri.endswith(":8")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": None, "e": [1, 2]}) == {
        "a.b": "1",
        "a.c": "{}",
        "d": "null",
        "e": "[1, 2]",
    }


def test_upload_by_two_at_once_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MlflowUploader(run_dir, toy_recipe("tracking.mlflow=false")).start()
    holder = os.fork()
    if holder == 0:
        with exclusive(run_dir / "mlflow.lock"):
            (run_dir / "held").touch()
            time.sleep(60)
    wait_for((run_dir / "held").exists)
    assert main(["upload", str(run_dir)]) == 1
    os.kill(holder, 9)
    os.waitpid(holder, 0)
    assert "another process" in capsys.readouterr().err


def test_the_page_of_a_run_gets_its_answer(mlflow_server: Any) -> None:
    """MLflow's page asks by GraphQL; without an answer it shows an error."""
    with mlflow_server:
        question = 'query Q { mlflowGetExperiment(input: {experimentId: "0"}) { experiment { name } } }'
        body = json.dumps({"operationName": "Q", "query": question, "variables": {}})
        request = urllib.request.Request(
            f"{mlflow_server.uri}/graphql", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    assert answer["data"]["mlflowGetExperiment"]["experiment"]["name"] == "Default"


def test_mistakes_are_one_line(mlflow_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", "nowhere"]) == 2
    assert main(["ui", "--runs-dir", "nowhere"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 2
    assert "nowhere has no readable tracking.json" in shown
    assert "train something first" in shown
