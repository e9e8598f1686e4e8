"""Registered models: signature, lineage to run, data and parent, and the call to Unity Catalog."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from data.text.bpe import train_bpe
from train.hf.__main__ import main as hf
from train.hf.lineage import parent_tags
from train.model.decoder import Decoder
from train.recipe.reading import load_recipe
from train.recipe.schema import Model, Moe, Recipe, Registry, Start, Tokenizer, TokenizerKind, Tracking
from train.record.summary import DatasetInput
from train.tracking.facts import RunFacts
from train.tracking.mlflow_upload import Upload
from train.tracking.registry import main

pytestmark = pytest.mark.slow

MakeRun = Callable[[Recipe], tuple[Path, Decoder]]


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Resets the URIs that MLflow keeps in the process."""
    import mlflow

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    mlflow.set_tracking_uri("")
    mlflow.set_registry_uri("")


@pytest.fixture
def recipe(mlflow_folder: Path) -> Recipe:
    shards = mlflow_folder / "shards"
    tokenizer = Tokenizer(kind=TokenizerKind.bpe, vocab_size=300)
    train_bpe(tokenizer, iter([Path(__file__).read_text()])).to_hugging_face(shards)
    base = load_recipe(Path(__file__).parents[3] / "yamls" / "smoke.yaml")
    moe = Moe(experts=4, top_k=2)
    model = Model(
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_hidden_size=40,
        vocab_size=300,
        max_sequence_tokens=64,
        clip_qkv=8,
        moe=moe,
    )
    return replace(
        base, name="child", model=model, tokenizer=tokenizer, data=replace(base.data, shards=str(shards))
    )


def _finished_run(recipe: Recipe, make_run: MakeRun) -> Path:
    """Returns a run whose record is still to be uploaded."""
    run, _ = make_run(recipe)
    (run / "metrics.jsonl").write_text("")
    datasets = [DatasetInput("code/train", "ab" * 32, "shards/code", 1000)]
    RunFacts(
        uid=recipe.name.ljust(32, "0"),
        name=recipe.name,
        uri="",
        experiment="finegrain",
        params={"seed": "17"},
        tags=parent_tags(recipe),
        datasets=datasets,
        artifacts=[],
        started_ms=1_700_000_000_000,
        status="FINISHED",
    ).write(run)
    return run


def test_a_version_with_signature_and_lineage_that_answers(
    recipe: Recipe, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    parent = _finished_run(replace(recipe, name="parent"), make_run)
    uploaded = Upload(parent)
    uploaded.sync()
    run = _finished_run(replace(recipe, start=Start(weights=str(parent))), make_run)
    out = run.parent / "out"
    assert hf(["export", str(run), str(out)]) == 0
    assert main([str(out), "--json", str(run.parent / "registered.json")]) == 0
    registered = json.loads((run.parent / "registered.json").read_text())
    assert (registered["name"], registered["version"]) == ("child", "1")
    client = mlflow.MlflowClient(registered["tracking_uri"], registered["registry_uri"])
    version = client.get_model_version("child", "1")
    assert version.run_id == registered["run_id"]
    assert client.get_run(version.run_id).info.status == "FINISHED"
    assert version.tags["checkpoint"] == "batch-00000007" and version.tags["tokens"] == "448"
    assert version.tags["data.code/train"] == "sha256:" + "ab" * 32
    assert version.tags["parent.run"] == "parent"
    assert version.tags["parent.mlflow_run_id"] == uploaded.state.run_id
    assert client.get_run(version.run_id).data.tags["parent.run"] == "parent"
    served = mlflow.pyfunc.load_model("models:/child/1")
    assert "prompt" in served.metadata.get_input_schema().input_names()
    greedy = {"prompt": "def one", "max_tokens": 4, "temperature": 0.0}
    said = [served.predict(greedy)[0] for _ in range(3)]
    assert said[0]["usage"]["completion_tokens"] == 4
    assert len({answer["choices"][0]["text"] for answer in said}) == 1
    sampling = mlflow.pyfunc.load_model("models:/child/1", model_config={"do_sample": True})
    assert sampling.predict({"prompt": "def one", "max_tokens": 4, "temperature": 9.0})[0]["choices"]
    _assert_is_where_this_mlflow_keeps_models(client, registered, version)
    assert main([str(out), "--name", "other"]) == 0
    assert "other version 1" in capsys.readouterr().out


def _assert_is_where_this_mlflow_keeps_models(client: Any, registered: dict[str, str], version: Any) -> None:
    """MLflow 3: next to the run's artifacts, with an id and the lineage; 2: among them."""
    import mlflow

    artifacts = Path(client.get_run(registered["run_id"]).info.artifact_uri.removeprefix("file://"))
    is_in_run = (artifacts / "model/MLmodel").is_file()
    if not hasattr(mlflow.entities, "LoggedModel"):
        assert registered["model_id"] == "" and is_in_run
        return
    assert not is_in_run and version.source == f"models:/{registered['model_id']}"
    model = client.get_logged_model(registered["model_id"])
    assert (model.name, model.source_run_id) == ("model", registered["run_id"])
    assert model.tags["checkpoint"] == "batch-00000007"
    assert "/mlflow-artifacts/models/m-" in model.artifact_location
    assert "MLmodel" in {file.path for file in client.list_logged_model_artifacts(model.model_id)}
    outputs = client.get_run(registered["run_id"]).outputs.model_outputs
    assert registered["model_id"] in {output.model_id for output in outputs}


class Databricks(BaseHTTPRequestHandler):
    """Records the requests to Unity Catalog and declines them."""

    asked: list[tuple[str, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        type(self).asked.append((self.path, body))
        answer = json.dumps({"error_code": "PERMISSION_DENIED", "message": "not in this catalog"}).encode()
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing."""


@pytest.fixture
def databricks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    Databricks.asked = []
    server = HTTPServer(("127.0.0.1", 0), Databricks)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DATABRICKS_TOKEN", "token")
    yield Databricks.asked
    server.shutdown()
    server.server_close()


def test_unity_catalog_is_asked_by_the_same_call(
    recipe: Recipe,
    make_run: MakeRun,
    databricks: list[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracking = Tracking(registry=Registry.unity_catalog, registered_model="main.models.child")
    run = _finished_run(replace(recipe, tracking=tracking), make_run)
    assert hf(["export", str(run), str(run.parent / "out")]) == 0
    assert main([str(run.parent / "out")]) == 1
    assert "registry: MLflow does not accept it" in capsys.readouterr().err
    assert any(
        "/unity-catalog/registered-models/create" in path and "main.models.child" in body
        for path, body in databricks
    )


def test_what_came_from_no_run_is_named(
    recipe: Recipe, make_run: MakeRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / "provenance.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "name one with --run" in capsys.readouterr().err
