"""Uploads to MLflow's own stores and server: everything once, despite any interruption."""

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.recipe.errors import UserError
from train.record import metrics
from train.record.step_log import StepLog, read_steps
from train.record.summary import DatasetInput
from train.tracking.facts import RunFacts
from train.tracking.mlflow_upload import VIEW_TAG, Upload, UploadError, public_uri
from train.tracking.names import chart_key, mlflow_key
from train.tracking.store import tagged_experiments

pytestmark = pytest.mark.slow

DATASETS = [
    DatasetInput(
        "code/train",
        "ab" * 32,
        "dbfs:/Volumes/main/pretraining/shards/code",
        1000,
        facts={"dataset": "my-code", "version": "3", "licence": "various " * 99, "origin": ""},
    ),
    DatasetInput("code/validation", "cd" * 32, ".cache/shards/code", 100, context="validation"),
]


def facts(uri: str = "", **changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "uid": "f" * 32,
        "name": "toy",
        "uri": public_uri(uri),
        "experiment": "finegrain",
        "params": {"model.d_model": "64", "seed": "17"},
        "tags": {"mlflow.source.git.commit": "0123abc", "package.torch": "2.7.0"},
        "datasets": DATASETS,
        "artifacts": ["report.html", "absent.txt"],
        "started_ms": 1_700_000_000_000,
    }
    return RunFacts(**(values | changes))


def write_steps(run_dir: Path, first: int, last: int, offset: float = 0.0) -> None:
    log = StepLog(run_dir / "metrics.jsonl")
    log.drop_after(first - 1)
    for step in range(first, last + 1):
        figures = {metrics.LOSS: 1 / step + offset, metrics.LEARNING_RATE: 1e-3, "experts/0/dead": 2}
        log.write(step, {"tokens": 8 * step, "time": 1_700_000_000 + step + offset, **figures})
        if step % 10 == 0:
            log.write(step, {metrics.validation_loss("code"): 2.0 + step})
    log.close()


def at_server(upload: Upload) -> dict[str, list[tuple[int, float]]]:
    """Returns every (step, value) of every metric on the server."""
    client, run_id = upload._client, upload.state.run_id
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def on_disk(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_steps(run_dir / "metrics.jsonl"):
        for key, value in line.items():
            if key not in ("step", "tokens", "time", "note"):
                found.setdefault(chart_key(key), []).append((line["step"], value))
    return found


@pytest.fixture
def run_dir(mlflow_folder: Path) -> Path:
    folder = mlflow_folder / "toy"
    folder.mkdir()
    (folder / "report.html").write_text("<p>report</p>")
    return folder


def test_everything_arrives_once(run_dir: Path) -> None:
    facts(status="FINISHED").write(run_dir)
    write_steps(run_dir, 1, 25)
    upload = Upload(run_dir)
    values = 25 * 3 + 2
    assert upload.sync() == values
    assert upload.sync() == 0
    assert Upload(run_dir).sync() == 0
    assert at_server(upload) == on_disk(run_dir)
    run = upload._client.get_run(upload.state.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "toy"
    assert run.data.params == {"model.d_model": "64", "seed": "17"}
    assert run.data.tags["mlflow.source.git.commit"] == "0123abc"
    inputs = {d.dataset.name: d for d in run.inputs.dataset_inputs}
    assert inputs["code/train"].dataset.digest == "ab" * 18
    assert json.loads(inputs["code/train"].dataset.source)["sha256"] == "ab" * 32
    assert json.loads(inputs["code/train"].dataset.profile) == {"num_tokens": 1000}
    assert inputs["code/train"].dataset.source_type == "dbfs"
    tags = {tag.key: tag.value for tag in inputs["code/train"].tags}
    licence = tags.pop("data.licence")
    assert len(licence) == 500 and licence == ("various " * 99)[:500]
    assert tags == {"mlflow.data.context": "training", "data.dataset": "my-code", "data.version": "3"}
    assert inputs["code/validation"].dataset.source_type == "local"
    assert inputs["code/validation"].tags[0].value == "validation"
    assert [f.path for f in upload._client.list_artifacts(upload.state.run_id)] == ["report.html"]
    assert not (run_dir.parent / "mlruns").exists()


def test_steps_that_come_later_are_sent_later(run_dir: Path) -> None:
    facts().write(run_dir)
    upload = Upload(run_dir)
    sent = [upload.sync()]
    for first, last in ((1, 9), (10, 10), (11, 17)):
        write_steps(run_dir, first, last)
        sent.append(upload.sync())
    assert at_server(upload) == on_disk(run_dir)
    assert sent == [0, 27, 3 + 1, 7 * 3]
    assert upload._client.get_run(upload.state.run_id).info.status == "RUNNING"


def test_evaluation_that_joins_a_sent_line_is_sent(run_dir: Path) -> None:
    facts().write(run_dir)
    log = StepLog(run_dir / "metrics.jsonl")
    log.write(1, {"time": 1.0, metrics.LOSS: 3.0})
    upload = Upload(run_dir)
    assert upload.sync() == 1
    log.write(1, {metrics.validation_loss("code"): 4.0})
    assert upload.sync() == 1
    assert at_server(upload) == on_disk(run_dir)


def test_infinite_and_missing_numbers_do_not_stop_it(run_dir: Path) -> None:
    facts().write(run_dir)
    log = StepLog(run_dir / "metrics.jsonl")
    log.write(1, {"time": 1.0, metrics.LOSS: math.inf, metrics.GRADIENT_NORM: math.nan})
    log.write(2, {"time": 2.0, metrics.LOSS: 3.0, metrics.GRADIENT_NORM: 1.0})
    upload = Upload(run_dir)
    assert upload.sync() == 4
    found = at_server(upload)
    assert math.isnan(found[chart_key(metrics.LOSS)][0][1])
    assert found[chart_key(metrics.LOSS)][1] == (2, 3.0)


@pytest.mark.parametrize("store", ["embedded", "files"])
def test_killed_twice_and_still_everything_once(run_dir: Path, store: str) -> None:
    uri = "" if store == "embedded" else (run_dir.parent / "files").as_uri()
    facts(uri, status="FINISHED").write(run_dir)
    write_steps(run_dir, 1, 800)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            die_after_request(Upload(run_dir))
        assert os.waitpid(child, 0)[1] == 9
    upload = Upload(run_dir)
    assert 0 < upload.sync() < 800 * 3 / 2
    assert at_server(upload) == on_disk(run_dir)
    assert (
        len(upload._client.search_runs([upload._client.get_run(upload.state.run_id).info.experiment_id])) == 1
    )


def die_after_request(upload: Upload) -> None:
    """Kills this process when the server has accepted metrics, before that is recorded."""
    from mlflow import MlflowClient

    plain: Callable[..., Any] = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        plain(self, run_id, metrics=metrics, **others)
        if metrics:
            os.kill(os.getpid(), 9)

    MlflowClient.log_batch = log_batch
    upload.sync()
    os._exit(0)


def test_lost_state_file_finds_the_run_again(run_dir: Path) -> None:
    facts().write(run_dir)
    write_steps(run_dir, 1, 5)
    first = Upload(run_dir)
    first.sync()
    (run_dir / "mlflow.json").unlink()
    second = Upload(run_dir)
    assert second.sync() == 0
    assert second.state.run_id == first.state.run_id


def test_resumed_run_goes_on_and_repeats_no_step(run_dir: Path) -> None:
    facts(status="FAILED").write(run_dir)
    write_steps(run_dir, 1, 10)
    first = Upload(run_dir)
    first.sync()
    before = at_server(first)
    # The checkpoint was of batch 5: five steps are trained again, with other timings.
    facts(params={"model.d_model": "64", "seed": "17", "data.workers": "2"}).write(run_dir)
    write_steps(run_dir, 6, 13, offset=0.5)
    upload = Upload(run_dir)
    assert upload.sync() == 3 * 3
    assert upload.state.run_id == first.state.run_id
    after = at_server(upload)
    assert [step for step, _ in after[chart_key(metrics.LOSS)]] == list(range(1, 14))
    assert after[chart_key(metrics.LOSS)][:10] == before[chart_key(metrics.LOSS)]
    run = upload._client.get_run(upload.state.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["data.workers"] == "2"


def test_other_lines_at_the_old_place_hide_no_step(run_dir: Path) -> None:
    def write_padded(first: int, last: int, width: int) -> None:
        log = StepLog(run_dir / "metrics.jsonl")
        log.drop_after(first - 1)
        for step in range(first, last + 1):
            line = {"time": 1.0, metrics.LOSS: 3.0, "note": ""}
            bare = len(json.dumps({"step": step, **line}, separators=(",", ":"))) + 1
            log.write(step, {**line, "note": "x" * (width - bare)})
        log.close()

    facts().write(run_dir)
    write_padded(1, 10, width=128)
    upload = Upload(run_dir)
    upload.sync()
    # From batch 4 again, with shorter lines: that of step 13 begins where that of step 10 began.
    write_padded(5, 16, width=80)
    assert upload.sync() == 6
    assert at_server(upload) == on_disk(run_dir)


def test_changed_parameter_becomes_a_tag(run_dir: Path) -> None:
    facts().write(run_dir)
    Upload(run_dir).sync()
    facts(params={"seed": "18"}).write(run_dir)
    upload = Upload(run_dir)
    upload.sync()
    run = upload._client.get_run(upload.state.run_id)
    assert run.data.params["seed"] == "17"
    assert run.data.tags["resumed_with.seed"] == "18"


def test_server_away_dies_and_comes_back(run_dir: Path, mlflow_server: Any) -> None:
    facts(mlflow_server.uri).write(run_dir)
    write_steps(run_dir, 1, 10)
    upload = Upload(run_dir)
    with pytest.raises(UploadError, match="ConnectionRefusedError"):
        upload.sync()
    with mlflow_server:
        assert upload.sync() == 31
    write_steps(run_dir, 11, 20)
    with pytest.raises(UploadError):
        upload.sync()
    with mlflow_server:
        assert upload.sync() == 31
        assert at_server(upload) == on_disk(run_dir)


def test_answer_that_was_lost_is_not_sent_again(
    run_dir: Path, mlflow_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts(mlflow_server.uri, uid="e" * 32).write(run_dir)
    write_steps(run_dir, 1, 10)
    with mlflow_server:
        upload = Upload(run_dir)
        upload.sync()
        write_steps(run_dir, 11, 20)
        plain = type(upload._client).log_batch

        def taken_but_unanswered(*arguments: Any, **options: Any) -> None:
            plain(*arguments, **options)
            raise ConnectionError("cut off")

        with monkeypatch.context() as patch:
            patch.setattr(type(upload._client), "log_batch", taken_but_unanswered)
            with pytest.raises(UploadError, match="cut off"):
                upload.sync()
        assert upload.sync() == 0
        assert at_server(upload) == on_disk(run_dir)


def test_server_that_hangs_is_given_up_in_seconds(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        facts(f"http://127.0.0.1:{silent.getsockname()[1]}").write(run_dir)
        with pytest.raises(UploadError, match="timed out"):
            Upload(run_dir).sync()


def test_password_is_neither_stored_nor_shown(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "http://me:hush@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    facts(secret).write(run_dir)
    upload = Upload(run_dir)
    assert upload.uri == secret
    with pytest.raises(UploadError) as error:
        upload.sync()
    assert "hush" not in str(error.value)
    assert not any("hush" in file.read_text() for file in run_dir.iterdir())


def test_run_without_facts_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no readable tracking\.json"):
        Upload(tmp_path)


def test_names_that_mlflow_does_not_accept_arrive_under_others(run_dir: Path) -> None:
    domains = ("c++", "c--", "c&&", "web (en)", "q&a", "stack@2024", "prosa größe", "..", "a:b", "x" * 199)
    params = {f"data.domains.{name}": "0.1" for name in domains}
    facts(params=params, tags={"resumed@": "1"}).write(run_dir)
    log = StepLog(run_dir / "metrics.jsonl")
    log.write(1, {"tokens": 1, "time": 1.0, **{metrics.validation_loss(name): 2.0 for name in domains}})
    log.write(2, {"tokens": 2, "time": "damaged", metrics.LOSS: 1.0})
    log.write(3, {"tokens": 3, "time": 3.0, metrics.LOSS: "damaged", metrics.LEARNING_RATE: 1.0})
    log.close()
    upload = Upload(run_dir)
    assert upload.sync("FINISHED") == len(domains) + 1
    assert upload.sync("FINISHED") == 0 and Upload(run_dir).sync("FINISHED") == 0
    run = upload._client.get_run(upload.state.run_id)
    sent = {chart_key(metrics.validation_loss(name)) for name in domains}
    assert len(sent) == len(domains) and sent < run.data.metrics.keys()
    meant = {run.data.tags.get(f"name.{key}", key) for key in run.data.params}
    assert meant == params.keys()


def test_a_key_is_changed_only_where_it_must_be() -> None:
    for key in ("loss/validation/code", "experts/0/dead", "a b", "größe", "x.y-z_1"):
        assert mlflow_key(key) == key
    changed = ["c++", "c--+", "/a", "a//b", "a/../b", "../a", ".", "..", "a/", "x" * 251, "x" * 252, "a\nb"]
    keys = [mlflow_key(key) for key in changed]
    assert len({*keys, *changed}) == 2 * len(changed) and max(map(len, keys)) <= 250
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    for key in keys:
        _validate_metric_name(key)
        _validate_param_name(key)


def test_losses_are_charted_first() -> None:
    keys = [metric.key for metric in metrics.METRICS]
    sent = [chart_key(key) for key in keys]
    assert len(set(sent)) == len(keys)
    assert [mine for key, mine in zip(keys, sent, strict=True) if not key.startswith("loss/")] == [
        mlflow_key(key) for key in keys if not key.startswith("loss/")
    ]
    # MLflow's page: groups by the codes of their letters, and those without a group last.
    groups = sorted({key.rpartition("/")[0] for key in sent} - {""})
    assert groups[:4] == ["Loss", "Loss/domain", "Loss/parts", "Loss/validation"] and "loss" not in groups
    assert sorted(key for key in sent if key.rpartition("/")[0] == "Loss") == ["Loss/total", "Loss/train"]


def test_the_experiment_opens_over_tokens(run_dir: Path) -> None:
    facts().write(run_dir)
    log = StepLog(run_dir / "metrics.jsonl")
    log.write(1, {"tokens": 8, "time": 1.0, metrics.LOSS: 2.0, metrics.TRAINED_TOKENS: 8})
    log.close()
    upload = Upload(run_dir)
    upload.sync()
    experiment = upload._client.get_experiment_by_name("finegrain")
    axis = json.loads(experiment.tags[VIEW_TAG])["globalLineChartConfig"]
    assert axis["xAxisKey"] == "metric" and axis["selectedXAxisMetricKey"] in at_server(upload)
    store = run_dir.parent / "mlflow.db"
    assert tagged_experiments(store, VIEW_TAG) == [(int(experiment.experiment_id), "finegrain")]
    upload._client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, "theirs")
    facts(uid="e" * 32).write(run_dir)
    (run_dir / "mlflow.json").unlink()
    other = Upload(run_dir)
    other.sync()
    assert other.state.run_id != upload.state.run_id
    assert other._client.get_experiment(experiment.experiment_id).tags[VIEW_TAG] == "theirs"


def test_a_run_that_was_begun_under_other_keys_keeps_them(run_dir: Path) -> None:
    facts().write(run_dir)
    write_steps(run_dir, 1, 9)
    upload = Upload(run_dir)
    upload._open_run()
    upload._metric_key = mlflow_key
    assert upload._send_metrics() == 27
    write_steps(run_dir, 10, 17)
    assert Upload(run_dir).sync() == 8 * 3 + 1
    assert at_server(upload).keys() == {
        metrics.LOSS,
        metrics.LEARNING_RATE,
        "experts/0/dead",
        metrics.validation_loss("code"),
    }
    assert len(at_server(upload)[metrics.LOSS]) == 17


def test_what_was_deleted_on_mlflows_page_is_named_with_a_remedy(run_dir: Path) -> None:
    facts().write(run_dir)
    write_steps(run_dir, 1, 2)
    upload = Upload(run_dir)
    upload.sync()
    client, run_id = upload._client, upload.state.run_id
    experiment_id = client.get_experiment_by_name("finegrain").experiment_id
    client.delete_run(run_id)
    with pytest.raises(
        UploadError, match=rf"the run toy was deleted .* mlflow runs restore --run-id {run_id}\)"
    ):
        Upload(run_dir).sync()
    client.delete_experiment(experiment_id)
    remedy = rf"mlflow experiments restore --experiment-id {experiment_id}\), or set tracking.experiment to"
    with pytest.raises(UploadError, match=f"the experiment finegrain was deleted .* {remedy}"):
        Upload(run_dir).sync()
    (run_dir / "mlflow.json").unlink()
    with pytest.raises(UploadError, match="the experiment finegrain was deleted"):
        Upload(run_dir).sync()
    client.restore_experiment(experiment_id)
    write_steps(run_dir, 3, 3)
    other = Upload(run_dir)
    assert other.sync() == 3 and other.state.run_id == run_id  # MLflow restores an experiment's runs with it.
    client.delete_run(run_id)
    facts(experiment="another").write(run_dir)
    assert Upload(run_dir).sync() == 9
