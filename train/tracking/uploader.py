"""The training side of the process that sends a run to MLflow.

Training never talks to a server. It writes files; a second process of low priority, started here, reads them
and sends what is new. A server that is down, hangs or dies does not affect training, nor do MLflow's import
and the first migration of its store, which together take ten seconds of one core.
"""

import dataclasses
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.reading import to_dict
from train.recipe.schema import Recipe
from train.record import log
from train.record.place import note_place
from train.record.provenance import git_commit, package_versions
from train.record.run_folder import (
    EVALUATION_FILE,
    LOAD_PICTURE_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SAMPLE_FILE,
    SUMMARY_FILE,
)
from train.record.summary import DatasetInput
from train.tracking.facts import RunFacts, own_facts
from train.tracking.mlflow_upload import (
    URI_VARIABLE,
    public_uri,
    store_uri,
)

CHECKOUT = str(Path(__file__).resolve().parents[2])
REQUEST_SECONDS = 10
ARTIFACTS = (
    REPORT_FILE,
    LOAD_PICTURE_FILE,
    RECIPE_FILE,
    SUMMARY_FILE,
    SAMPLE_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
)

logger = log.get_logger(__name__)


class MlflowUploader:
    """Starts and ends the process that follows a run's files; for rank 0 only.

    The facts are always written, so that a run with `tracking.mlflow=false` can be uploaded later.

    Args:
        run_dir: folder of the run.
        recipe: the resolved recipe; its leaves become MLflow's parameters.
        datasets: datasets that the run reads.
        tags: additional tags, for example the parent's run.
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: Recipe,
        datasets: Sequence[DatasetInput] = (),
        tags: dict[str, str] | None = None,
    ) -> None:
        self.run_dir = run_dir.resolve()
        self.enabled = recipe.tracking.mlflow
        self.uri = recipe.tracking.uri or os.environ.get(URI_VARIABLE, "")
        self.facts = collect_facts(self.run_dir, recipe, datasets, self.uri, tags or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts sending, in a separate process."""
        self.facts.write(self.run_dir)
        note_place(self.run_dir)
        if not self.enabled:
            return
        environment = os.environ | {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([CHECKOUT, os.environ.get("PYTHONPATH", "")]),
        }
        if self.uri:
            # A password is passed in the environment and never written to a file.
            environment[URI_VARIABLE] = self.uri
        command = [sys.executable, "-m", "train.tracking", "follow", str(self.run_dir)]
        try:
            self._process = subprocess.Popen(
                [*command, "--parent", str(os.getpid()), *log.options()],
                env=environment,
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for the training process, which then ends this one.
                start_new_session=True,
            )
        except OSError as error:
            logger.warning(f"tracking: not started ({error}); upload later: {upload_command(self.run_dir)}")

    def finish(self, status: str = "FINISHED", timeout_s: float = 60.0) -> bool:
        """Sends the rest, including report and recipe, and ends the process.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_s: time to wait for a slow server; unsent records stay on disk.

        Returns:
            True if everything has been sent.
        """
        self.facts = dataclasses.replace(self.facts, status=status)
        self.facts.write(self.run_dir)
        if self._process is None:
            return False
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            logger.info(f"tracking: sending the last figures to {store_of(self.run_dir, self.facts)}")
        try:
            is_sent = self._process.wait(timeout=timeout_s) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            is_sent = False
        self._process = None
        if not is_sent:
            logger.warning(
                f"tracking: not everything was sent to {store_of(self.run_dir, self.facts)}; "
                f"upload later: {upload_command(self.run_dir)}"
            )
        return is_sent


def collect_facts(
    run_dir: Path, recipe: Recipe, datasets: Sequence[DatasetInput], uri: str, tags: dict[str, str]
) -> RunFacts:
    """Collects the facts of a run for MLflow; a resumed run keeps its identity, a copied one gets its own."""
    try:
        before = own_facts(run_dir)
        uid, started_ms = before.uid, before.started_ms
    except UserError:
        uid, started_ms = uuid.uuid4().hex, round(time.time() * 1000)
    params = flatten(to_dict(recipe))
    if recipe.tracking.uri:
        params["tracking.uri"] = public_uri(recipe.tracking.uri)
    packages = {f"package.{name}": version for name, version in package_versions().items()}
    return RunFacts(
        uid=uid,
        name=recipe.name,
        uri=public_uri(uri),
        experiment=recipe.tracking.experiment,
        params=params,
        tags={
            "mlflow.source.name": "train/main.py",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": git_commit(),
            **packages,
            **tags,
        },
        datasets=list(datasets),
        artifacts=list(ARTIFACTS),
        started_ms=started_ms,
    )


def flatten(tree: object, prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to text under dotted keys."""
    if isinstance(tree, dict) and tree:
        return {
            key: text
            for name, item in tree.items()
            for key, text in flatten(item, f"{prefix}{name}.").items()
        }
    return {prefix[:-1]: "null" if tree is None else str(tree)}


def store_of(run_dir: Path, facts: RunFacts) -> str:
    """Returns the store of a run, without a password."""
    return public_uri(store_uri(run_dir, facts.uri))


def upload_command(run_dir: Path) -> str:
    """Returns the command that sends unsent records later."""
    return f"python -m train.tracking upload {short_path(run_dir)}"


def short_path(path: Path) -> str:
    """Returns a path relative to the working directory, if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
