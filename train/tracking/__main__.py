"""Runs and MLflow, by hand: `python -m train.tracking upload runs/NAME`, `... ui`.

`follow` is the process beside a training run, see :mod:`train.tracking.uploader`.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from train.tracking.mlflow_upload import (
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
)
from train.tracking.uploader import say, short_path, store_of

POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0
TICK_SECONDS = 0.2
UNSENT_STATUS = 3
LOWER_PRIORITY = 10


def follow(run_dir: Path, parent: int) -> int:
    """Sends what is new until the run is over; the process that :class:`MlflowUploader` starts."""
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
                    say(f"{place} does not take records ({error}); they wait in {short_path(run_dir)}")
            else:
                if failures:
                    say(f"{place} answers again; {sent} figures that waited are there")
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
            place = store_of(run_dir, RunFacts.read(run_dir))
            raise UploadError(f"{run_dir}: {place} does not take it ({error})") from None
        row = {"run": str(run_dir), "uri": store_of(run_dir, upload.facts), "run_id": upload.state.run_id}
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
