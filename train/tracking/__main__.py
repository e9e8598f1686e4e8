"""MLflow from the command line: `python -m train.tracking upload runs/NAME`, `... ui`.

`follow` runs in the background of a training run, see :mod:`train.tracking.uploader`.
"""

import dataclasses
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from train.recipe.errors import UserError
from train.record import log
from train.record.command import CommandGroup, Figures, command
from train.tracking.facts import FACTS_FILE, RUNNING, RunFacts
from train.tracking.mlflow_upload import (
    ARTIFACTS_FOLDER,
    LOCK_FILE,
    STORE_FILE,
    TOKENS_VIEW,
    URI_VARIABLE,
    VIEW_TAG,
    Upload,
    UploadError,
    public_uri,
)
from train.tracking.store import exclusive, tagged_experiments, take_over
from train.tracking.uploader import short_path, store_of

POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
TICK_SECONDS = 0.2
UNSENT_STATUS = 3
LOWER_PRIORITY = 10
VIEW = "/#/experiments?workflowType=machine_learning"
"""Experiments as trainings: without the choice MLflow 3 shows them as agents. MLflow 2 ignores it."""
CHARTS = f"/#/experiments/ID/runs?viewStateShareKey={TOKENS_VIEW}&compareRunsMode=CHART"
"""Charts of an experiment's runs over tokens."""

logger = log.get_logger("train.tracking")


def follow(run_dir: Path, parent: int) -> int:
    """Sends new records until the run ends; runs in the process that :class:`MlflowUploader` starts."""
    os.nice(LOWER_PRIORITY)
    with exclusive(run_dir / LOCK_FILE):
        upload = Upload(run_dir)
        place = store_of(run_dir, upload.facts)
        failures = 0
        while True:
            orphaned = os.getppid() != parent
            status = RunFacts.read(run_dir).status
            is_last = orphaned or status != RUNNING
            try:
                sent = upload.sync("FAILED" if orphaned and status == RUNNING else None)
            except UploadError as error:
                failures += 1
                if failures == 1 and not is_last:
                    logger.warning(
                        f"tracking: {place} does not accept records ({error}); they wait in "
                        f"{short_path(run_dir)}"
                    )
            else:
                if failures:
                    logger.warning(f"tracking: {place} responds again; {sent} waiting values were sent")
                failures = 0
            if is_last:
                return UNSENT_STATUS if failures else 0
            _wait(run_dir, parent, min(LONGEST_WAIT_SECONDS, POLL_SECONDS * 2 ** min(failures, 10)))


def _wait(run_dir: Path, parent: int, seconds: float) -> None:
    """Waits, but at most until the end of the run."""
    facts = run_dir / FACTS_FILE
    changed = facts.stat().st_mtime_ns
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.getppid() == parent and facts.stat().st_mtime_ns == changed:
        time.sleep(TICK_SECONDS)


def upload_runs(run_dirs: Sequence[Path], uri: str | None) -> list[dict[str, object]]:
    """Sends the unsent records of each run.

    Raises:
        UploadError: for the first run that cannot be sent.
    """
    rows: list[dict[str, object]] = []
    for run_dir in run_dirs:
        facts = RunFacts.read(run_dir)
        if uri is not None:
            os.environ[URI_VARIABLE] = uri
            dataclasses.replace(facts, uri=public_uri(uri)).write(run_dir)
        try:
            with exclusive(run_dir / LOCK_FILE, wait=False):
                upload = Upload(run_dir)
                sent = upload.sync()
        except BlockingIOError:
            raise UploadError(f"{run_dir}: another process is sending this run; wait for it to end") from None
        except UploadError as error:
            place = store_of(run_dir, RunFacts.read(run_dir))
            raise UploadError(f"{run_dir}: {place} does not accept it ({error})") from None
        row = {"run": str(run_dir), "uri": store_of(run_dir, upload.facts), "run_id": upload.state.run_id}
        rows.append({**row, "metric_values_sent": sent})
        print(f"{run_dir}: {sent} metric values sent to {row['uri']}, MLflow run {row['run_id']}")
    return rows


def serve(runs_dir: Path, host: str, port: int) -> int:
    """Serves MLflow's UI for the embedded store; replaces this process.

    Raises:
        UserError: if there is no store yet, or a newer MLflow wrote it.
    """
    store = (runs_dir / STORE_FILE).resolve()
    if not store.is_file():
        raise UserError(
            f"{runs_dir}: has no {STORE_FILE} yet; train something first, for example `make smoke`"
        )
    with log.only_warnings(), exclusive(store.with_suffix(".lock")):
        take_over(store)
    print(f"MLflow on {store}: http://{host}:{port}{VIEW} (stop with Ctrl-C)", flush=True)
    for number, name in tagged_experiments(store, VIEW_TAG):
        charts = CHARTS.replace("ID", str(number))
        print(f"charts of {name} over tokens: http://{host}:{port}{charts}", flush=True)
    # MLflow 3 runs jobs for agents in a process of their own, of which runs have none.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # MLflow's server creates a folder in its working directory.
    os.chdir(store.parent)
    arguments = ["server", "--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    arguments += ["--default-artifact-root", (store.parent / ARTIFACTS_FOLDER).as_uri()]
    os.execv(
        sys.executable, [sys.executable, "-m", "mlflow", *arguments, "--host", host, "--port", str(port)]
    )


def _upload_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, runs/NAME")
    parser.add_argument("--uri", help="send to this tracking server, also in future, instead of the recipe's")


def _page_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=5000, help="port (default: 5000)")


def _follow_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--parent", type=int, required=True, help="stop when this process has ended")


@command(
    "python -m train.tracking upload",
    "send the unsent records of runs; can be repeated at any time",
    _upload_arguments,
    json="also write what was sent as JSON",
)
def _upload(options: Namespace) -> int | Figures:
    try:
        with log.only_warnings():
            return Figures(upload_runs(options.run, options.uri))
    except UploadError as error:
        logger.error(f"tracking: {error}")
        return 1


@command("python -m train.tracking ui", "serve MLflow's UI for the embedded store", _page_arguments)
def _page(options: Namespace) -> int:
    return serve(options.runs_dir, options.host, options.port)


@command(
    "python -m train.tracking follow",
    "send the records of a run in training; started by the run itself",
    _follow_arguments,
)
def _follow(options: Namespace) -> int:
    try:
        with log.only_warnings():
            return follow(options.run, options.parent)
    except UploadError as error:
        logger.error(f"tracking: {error}")
        return 1


main = CommandGroup(
    "python -m train.tracking",
    "Sends runs to MLflow and serves its UI.",
    {"upload": _upload, "ui": _page, "follow": _follow},
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
