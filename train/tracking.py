"""MLflow next to a run, and by hand: `python -m train.tracking upload runs/NAME`, `... ui`.

Training never speaks to a server. It writes files; a second process of low priority, started here,
reads them and sends what is new. A server that is down, hangs or dies costs the training nothing, and
neither do MLflow's import and the first migration of its store, ten seconds of one core together.
"""

import argparse
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from train.mlflow_upload import (
    ARTIFACTS_FOLDER,
    FACTS_FILE,
    LOCK_FILE,
    RUNNING,
    STORE_FILE,
    URI_VARIABLE,
    RunFacts,
    Upload,
    UploadError,
    exclusive,
    public_uri,
    store_uri,
)
from train.provenance import git_commit, package_versions
from train.recipe import to_dict
from train.run_folder import METRICS_FILE, RECIPE_FILE, REPORT_FILE, SAMPLE_FILE, SUMMARY_FILE
from train.schema import Recipe
from train.summary import DatasetInput

CHECKOUT = str(Path(__file__).resolve().parents[1])
POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
TICK_SECONDS = 0.2
UNSENT_STATUS = 3
LOWER_PRIORITY = 10
REQUEST_SECONDS = 10
ARTIFACTS = (REPORT_FILE, RECIPE_FILE, SUMMARY_FILE, SAMPLE_FILE, METRICS_FILE)


class MlflowUploader:
    """Starts and ends the process that follows a run's files; for the main rank alone.

    The facts are written in any case, so that a run made with `tracking.mlflow=false` can be uploaded
    later.

    Args:
        run_dir: folder of the run.
        recipe: the resolved recipe; its leaves become MLflow's parameters.
        datasets: what the run reads.
        tags: further tags, for example the parent's run.
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
        """Begins to send, in a process of its own."""
        self.facts.write(self.run_dir)
        if not self.enabled:
            return
        environment = os.environ | {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([CHECKOUT, os.environ.get("PYTHONPATH", "")]),
        }
        if self.uri:
            # A password is handed on in the environment and never written to a file.
            environment[URI_VARIABLE] = self.uri
        command = [sys.executable, "-m", "train.tracking", "follow", str(self.run_dir)]
        try:
            self._process = subprocess.Popen(
                [*command, "--parent", str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                # An interrupt from the keyboard is for the training, which then ends this process.
                start_new_session=True,
            )
        except OSError as error:
            _say(f"not started ({error}); later: {_command(self.run_dir)}")

    def finish(self, status: str = "FINISHED", timeout_s: float = 60.0) -> bool:
        """Has the rest sent, report and recipe included, and ends the process.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout_s: how long to wait for a slow server; what is unsent then stays on disk.

        Returns:
            Whether everything has been sent.
        """
        self.facts = dataclasses.replace(self.facts, status=status)
        self.facts.write(self.run_dir)
        if self._process is None:
            return False
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            _say(f"sending the last figures to {_place(self.run_dir, self.facts)}")
        try:
            is_sent = self._process.wait(timeout=timeout_s) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            is_sent = False
        self._process = None
        if not is_sent:
            _say(f"not everything is at {_place(self.run_dir, self.facts)}; later: {_command(self.run_dir)}")
        return is_sent


def collect_facts(
    run_dir: Path, recipe: Recipe, datasets: Sequence[DatasetInput], uri: str, tags: dict[str, str]
) -> RunFacts:
    """What MLflow is told about this run; a resumed one keeps its identity."""
    try:
        before = RunFacts.read(run_dir)
        uid, started_ms = before.uid, before.started_ms
    except UploadError:
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
    """Leaves of nested mappings as text under dotted keys."""
    if isinstance(tree, dict) and tree:
        return {
            key: text
            for name, item in tree.items()
            for key, text in flatten(item, f"{prefix}{name}.").items()
        }
    return {prefix[:-1]: "null" if tree is None else str(tree)}


def follow(run_dir: Path, parent: int) -> int:
    """Sends what is new until the run is over; the process that :class:`MlflowUploader` starts."""
    os.nice(LOWER_PRIORITY)
    with exclusive(run_dir / LOCK_FILE):
        upload = Upload(run_dir)
        place = _place(run_dir, upload.facts)
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
                    _say(f"{place} does not take records ({error}); they wait in {_shown(run_dir)}")
            else:
                if failures:
                    _say(f"{place} answers again; {sent} figures that waited are there")
                failures = 0
            if is_last:
                return UNSENT_STATUS if failures else 0
            _wait(run_dir, parent, min(LONGEST_WAIT_SECONDS, POLL_SECONDS * 2 ** min(failures, 10)))


def _wait(run_dir: Path, parent: int, seconds: float) -> None:
    """Waits, but not past the end of the run."""
    facts = run_dir / FACTS_FILE
    changed = facts.stat().st_mtime_ns
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.getppid() == parent and facts.stat().st_mtime_ns == changed:
        time.sleep(TICK_SECONDS)


def upload_runs(run_dirs: Sequence[Path], uri: str | None) -> list[dict[str, object]]:
    """Sends what is unsent of each run.

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
            raise UploadError(f"{run_dir}: another process is sending this run; wait for its end") from None
        except UploadError as error:
            place = _place(run_dir, RunFacts.read(run_dir))
            raise UploadError(f"{run_dir}: {place} does not take it ({error})") from None
        row = {"run": str(run_dir), "uri": _place(run_dir, upload.facts), "run_id": upload.state.run_id}
        rows.append({**row, "metric_values_sent": sent})
        print(f"{run_dir}: {sent} metric values sent to {row['uri']}, MLflow run {row['run_id']}")
    return rows


def serve(runs_dir: Path, host: str, port: int) -> int:
    """Opens MLflow's page on the embedded store; does not return while it runs."""
    store = (runs_dir / STORE_FILE).resolve()
    if not store.is_file():
        print(
            f"{runs_dir}: has no {STORE_FILE} yet; train something first, for example `make smoke`",
            file=sys.stderr,
        )
        return 2
    print(f"MLflow on {store}: http://{host}:{port} (end with Ctrl-C)", flush=True)
    # Its server makes a folder where it is started.
    os.chdir(store.parent)
    arguments = ["server", "--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    arguments += ["--default-artifact-root", (store.parent / ARTIFACTS_FOLDER).as_uri()]
    os.execv(
        sys.executable, [sys.executable, "-m", "mlflow", *arguments, "--host", host, "--port", str(port)]
    )


def main(arguments: list[str]) -> int:
    """Runs the command line."""
    options = parse(arguments)
    # MLflow tells of every migration of a new store, forty lines.
    logging.disable(logging.INFO)
    if options.command == "ui":
        return serve(options.runs_dir, options.host, options.port)
    try:
        if options.command == "follow":
            return follow(options.run, options.parent)
        rows = upload_runs(options.run, options.uri)
    except UploadError as error:
        print(f"tracking: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.tracking", description="Runs and MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    upload = commands.add_parser("upload", help="send what is unsent of runs; again and again if you like")
    upload.add_argument("run", type=Path, nargs="+", help="folder of a run, runs/NAME")
    upload.add_argument("--uri", help="send to this tracking server, from now on, instead of the recipe's")
    upload.add_argument("--json", type=Path, metavar="FILE", help="write what was sent as JSON too")
    page = commands.add_parser("ui", help="MLflow's page on the embedded store")
    page.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
    )
    page.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    page.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    following = commands.add_parser("follow", help="send a run while it is trained; started by the training")
    following.add_argument("run", type=Path, help="folder of the run")
    following.add_argument("--parent", type=int, required=True, help="process whose end ends this one")
    return parser.parse_args(arguments)


def _place(run_dir: Path, facts: RunFacts) -> str:
    return public_uri(store_uri(run_dir, facts.uri))


def _command(run_dir: Path) -> str:
    return f"python -m train.tracking upload {_shown(run_dir)}"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _say(text: str) -> None:
    print(f"tracking: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
