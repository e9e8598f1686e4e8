"""Upload of a run's record to MLflow: repeatable at any time, each value sent once.

The record is in the run's folder: `tracking.json` (parameters, tags, datasets, files) and `metrics.jsonl`.
The server knows what has been sent: the latest step of every metric. So an upload can be interrupted
anywhere, even between the server's commit and its response, and the next one continues there. A step that is
retrained after a crash is not sent again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from train.recipe.errors import UserError
from train.recipe.secrets import without_secrets
from train.record.files import write_json
from train.record.metrics import LOSS, TRAINED_TOKENS, find_metric
from train.record.run_folder import METRICS_FILE, MLFLOW_FILE
from train.record.step_log import STEP, TIMESTAMP, lines_from
from train.record.summary import DatasetInput
from train.record.tags import read_tags
from train.tracking.facts import RUNNING, RunFacts, own_facts
from train.tracking.folding import FOLDED, folded
from train.tracking.names import chart_key, mlflow_key
from train.tracking.store import connect

Result = TypeVar("Result")

LOCK_FILE = "mlflow.lock"
STORE_FILE = "mlflow.db"
ARTIFACTS_FOLDER = "mlflow-artifacts"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
UID_TAG = "finegrain.uid"
DELETED = "deleted"
"""MLflow's stage of experiments and runs that were deleted on its page: they are kept, but take nothing."""

METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 500
"""MLflow's limit for the value of an input's tag."""
DIGEST_CHARACTERS = 36
TOKENS_VIEW = "tokens"
VIEW_TAG = f"mlflow.sharedViewState.{TOKENS_VIEW}"
"""The experiment's tag of a shared view: MLflow's page opens with charts over tokens."""
_VIEW = {
    "globalLineChartConfig": {
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": TRAINED_TOKENS,
        "lineSmoothness": 0,
    }
}


class UploadError(RuntimeError):
    """MLflow did not accept an upload; everything is still on disk and can be sent later."""


@dataclasses.dataclass
class UploadState:
    """Progress of the upload to one server; only a hint, as the server is authoritative."""

    uri: str = ""
    run_id: str = ""
    offset: int = 0
    """Offset in `metrics.jsonl` of the last line sent."""
    step: int = -1
    """The line's step."""
    setup: str = ""
    """Fingerprint of the name, parameters, tags and datasets sent."""
    tags: list[str] = dataclasses.field(default_factory=list)
    """The people's tags among those sent."""
    ending: str = ""
    """Fingerprint of the status and files sent."""


def public_uri(uri: str) -> str:
    """Removes user, password and other secrets from an address, for files and logs."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return without_secrets(uri)
    return without_secrets(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))


def store_uri(run_dir: Path, facts_uri: str = "") -> str:
    """Returns the server's address: the recorded one with the variable's password, or the embedded store."""
    variable = os.environ.get(URI_VARIABLE, "")
    if facts_uri:
        return variable if public_uri(variable) == facts_uri else facts_uri
    return f"sqlite:///{run_dir.resolve().parent / STORE_FILE}"


class Upload:
    """The upload of one run; each :meth:`sync` sends what is new. MLflow's name of a run is its folder's."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.facts = own_facts(run_dir)
        self.uri = store_uri(run_dir, self.facts.uri)
        self.name = run_dir.resolve().name
        self.place = public_uri(self.uri) if self.facts.uri else STORE_FILE
        """The store in the record of what was sent: without a path, which a moved folder would keep."""
        self.state = self._read_state()
        self._client: Any = None
        self._latest: dict[str, int] | None = None
        self._metric_key = chart_key

    def sync(self, status: str | None = None) -> int:
        """Sends everything that the server lacks.

        Args:
            status: the run's status if `tracking.json` is out of date, as after a kill.

        Returns:
            The number of metric values sent.

        Raises:
            UploadError: if the server does not accept it.
        """
        return self._call(lambda: self._sync(status))

    def _sync(self, status: str | None) -> int:
        self.facts = RunFacts.read(self.run_dir)
        self._open_run()
        self._send_setup()
        sent = self._send_metrics()
        self._send_ending(status or self.facts.status)
        return sent

    def _call(self, work: Callable[[], Result]) -> Result:
        """Does some work with the server."""
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return work()
        except UserError as error:
            raise UploadError(str(error)) from error
        except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:
            self._latest = None  # The server may have accepted it nevertheless: ask again.
            raise UploadError(_reason(error).replace(self.uri, public_uri(self.uri))) from error

    def _connect(self) -> None:
        if self._client is None:
            self._client = connect(self.uri, self.run_dir.resolve().parent / ARTIFACTS_FOLDER)

    def delete(self) -> str:
        """Deletes the run on the server, as MLflow's page does; returns its id, empty if it has none.

        Raises:
            UploadError: if the server does not accept it.
        """
        return self._call(self._delete)

    def _delete(self) -> str:
        self._connect()
        run = self._find_run()
        if run is None:
            return ""
        self._client.delete_run(run.info.run_id)
        return str(run.info.run_id)

    def _open_run(self) -> None:
        """Finds or creates the run and reads its latest steps."""
        if self._latest is not None:
            return
        self._connect()
        run = self._find_run() or self._create_run()
        # Every store returns the latest steps with the run; MLflow exposes them only under this name.
        latest = {metric.key: metric.step for metric in run.data._metric_objs}
        if self.state.step > max(latest.values(), default=-1):
            # The server has less than it was sent: somebody went back to an earlier copy of its store.
            self.state = UploadState(uri=self.place)
        self.state.run_id = run.info.run_id
        self._write_state()
        self._latest = latest
        # A run that was sent under the keys of the record keeps them, or its charts would end here.
        self._metric_key = mlflow_key if LOSS in latest else chart_key

    def _find_run(self) -> Any:
        from mlflow.exceptions import MlflowException

        if self.state.run_id:
            try:
                run = self._client.get_run(self.state.run_id)
                if run.info.lifecycle_stage != DELETED:
                    return run
                self._refuse_deleted(run)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            self.state = UploadState(uri=self.place)
        experiment = self._experiment()
        if experiment is None:
            return None
        found = self._client.search_runs(
            [experiment.experiment_id], f"tags.`{UID_TAG}` = '{self.facts.uid}'", max_results=1
        )
        return found[0] if found else None

    def _experiment(self) -> Any:
        """Returns the run's experiment; None if there is none yet.

        Raises:
            UserError: if it was deleted: MLflow keeps it under its name, and takes no run for it.
        """
        experiment = self._client.get_experiment_by_name(self.facts.experiment)
        if experiment is not None and experiment.lifecycle_stage == DELETED:
            restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise self._deleted(f"the experiment {self.facts.experiment}", restore)
        return experiment

    def _refuse_deleted(self, run: Any) -> None:
        """Raises for a deleted run, unless the recipe now names another experiment than the run's."""
        if self._client.get_experiment(run.info.experiment_id).name == self.facts.experiment:
            self._experiment()
            raise self._deleted(f"the run {self.name}", f"mlflow runs restore --run-id {run.info.run_id}")

    def _deleted(self, what: str, restore: str) -> UserError:
        return UserError(
            f"{what} was deleted in {public_uri(self.uri)}",
            remedy=f"restore it (MLFLOW_TRACKING_URI={public_uri(self.uri)} {restore}), or set "
            "tracking.experiment to another name",
        )

    def _create_run(self) -> Any:
        experiment = self._experiment()
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            embedded = self.uri.startswith("sqlite:")
            place = (self.run_dir.resolve().parent / ARTIFACTS_FOLDER).as_uri() if embedded else None
            experiment_id = self._client.create_experiment(self.facts.experiment, artifact_location=place)
        if experiment is None or VIEW_TAG not in experiment.tags:
            self._client.set_experiment_tag(experiment_id, VIEW_TAG, json.dumps(_VIEW))
        return self._client.create_run(
            experiment_id,
            start_time=self.facts.started_ms,
            run_name=self.name,
            tags={UID_TAG: self.facts.uid},
        )

    def _send_setup(self) -> None:
        """Sends name, parameters, tags and datasets once, and again if they changed."""
        from mlflow.entities import Param, RunTag

        facts = self.facts
        given = {mlflow_key(key): value for key, value in read_tags(self.run_dir).items()}
        datasets = [dataclasses.asdict(dataset) for dataset in facts.datasets]
        setup = _fingerprint([self.name, facts.params, facts.tags, given, datasets])
        if setup == self.state.setup:
            return
        run = self._client.get_run(self.state.run_id)
        if run.info.run_name != self.name:
            self._client.update_run(self.state.run_id, name=self.name)
        params = {mlflow_key(key): value[:PARAM_CHARACTERS] for key, value in facts.params.items()}
        # Parameters are immutable on the server: changes of a resumed run become tags.
        changed = {key: value for key, value in params.items() if run.data.params.get(key, value) != value}
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        tags = {mlflow_key(key): value for key, value in facts.tags.items()}
        tags |= {mlflow_key(f"resumed_with.{key}"): value for key, value in changed.items()}
        tags |= {f"name.{mlflow_key(key)}": key for key in facts.params if mlflow_key(key) != key}
        for key in set(self.state.tags) - given.keys():
            self._client.delete_tag(self.state.run_id, key)
        tags |= given
        for start in range(0, len(new), PARAMS_PER_REQUEST):
            self._client.log_batch(self.state.run_id, params=new[start : start + PARAMS_PER_REQUEST])
        labels = [RunTag(key, value[:PARAM_CHARACTERS]) for key, value in tags.items()]
        for start in range(0, len(labels), PARAMS_PER_REQUEST):
            self._client.log_batch(self.state.run_id, tags=labels[start : start + PARAMS_PER_REQUEST])
        known = {(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs}
        inputs = [
            _mlflow_input(d) for d in facts.datasets if (d.name, d.digest[:DIGEST_CHARACTERS]) not in known
        ]
        if inputs:
            self._client.log_inputs(self.state.run_id, inputs)
        self.state.setup, self.state.tags = setup, sorted(given)
        self._write_state()

    def _send_metrics(self) -> int:
        """Sends new lines of `metrics.jsonl`, up to 1000 values per request."""
        from mlflow.entities import Metric

        sent = 0
        batch: list[Any] = []
        place = (self.state.offset, self.state.step)
        for start, fields in self._new_lines():
            if not isinstance(fields.get(TIMESTAMP), int | float):
                continue  # A damaged line.
            step, time_ms = fields[STEP], round(fields[TIMESTAMP] * 1e3)
            values = [
                Metric(self._metric_key(key), float("nan") if value is None else value, time_ms, step)
                for key, value in folded(fields).items()
                if self._is_new(key, step) and isinstance(value, int | float | None)
            ]
            if batch and len(batch) + len(values) > METRICS_PER_REQUEST:
                sent += self._send(batch, place)
                batch = []
            batch += values
            place = (start, step)
        return sent + self._send(batch, place)

    def _send(self, batch: list[Any], place: tuple[int, int]) -> int:
        """Sends values, the last of which are from the line with this offset and step."""
        assert self._latest is not None
        for start in range(0, len(batch), METRICS_PER_REQUEST):
            part = batch[start : start + METRICS_PER_REQUEST]
            self._client.log_batch(self.state.run_id, metrics=part)
            self._latest |= {metric.key: metric.step for metric in part}
        if batch:
            self.state.offset, self.state.step = place
            self._write_state()
        return len(batch)

    def _new_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields lines from the last one sent, to which an evaluation may have been added since."""
        path = self.run_dir / METRICS_FILE
        first = next(lines_from(path, self.state.offset), None)
        # A resumed run truncates the file and writes other lines, which invalidates the offset.
        offset = self.state.offset if first and first[2][STEP] <= self.state.step else 0
        for start, _, fields in lines_from(path, offset):
            yield start, fields

    def _is_new(self, key: str, step: int) -> bool:
        assert self._latest is not None
        is_metric = find_metric(key) is not None or key in FOLDED
        return is_metric and step > self._latest.get(self._metric_key(key), -1)

    def _send_ending(self, status: str) -> None:
        """Sends the files and ends the run on the server, or marks it as running again."""
        files = [self.run_dir / name for name in self.facts.artifacts if (self.run_dir / name).is_file()]
        if status == RUNNING:
            files = []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        ending = _fingerprint([status, stats])
        if ending == self.state.ending:
            return
        for file in files:
            self._client.log_artifact(self.state.run_id, str(file))
        if status == RUNNING:
            self._client.update_run(self.state.run_id, status=status)
        else:
            self._client.set_terminated(self.state.run_id, status=status)
        self.state.ending = ending
        self._write_state()

    def _read_state(self) -> UploadState:
        path = self.run_dir / MLFLOW_FILE
        try:
            state = UploadState(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return UploadState(uri=self.place)
        return state if state.uri == self.place else UploadState(uri=self.place)

    def _write_state(self) -> None:
        write_json(self.run_dir / MLFLOW_FILE, dataclasses.asdict(self.state))


def _reason(error: BaseException) -> str:
    """Returns the root cause of an error in one line: `ConnectionRefusedError: Connection refused`."""
    while below := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = below
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _mlflow_input(dataset: DatasetInput) -> Any:
    from mlflow.entities import Dataset, InputTag
    from mlflow.entities import DatasetInput as MlflowInput

    return MlflowInput(
        dataset=Dataset(
            name=dataset.name,
            # MLflow keeps 36 characters of a digest; the source has the full one.
            digest=dataset.digest[:DIGEST_CHARACTERS],
            source_type=urlsplit(dataset.source).scheme or "local",
            source=json.dumps({"uri": dataset.source, "sha256": dataset.digest}),
            profile=json.dumps({"num_tokens": dataset.tokens}),
        ),
        tags=[
            InputTag("mlflow.data.context", dataset.context),
            *(InputTag(f"data.{key}", fact[:TAG_CHARACTERS]) for key, fact in dataset.facts.items() if fact),
        ],
    )


def _fingerprint(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
