"""A ladder in MLflow: one experiment, a parent run with the comparison, and the ladder's runs as children."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from launch.experiments.ladder.plan import Ladder, Run
from train.recipe.errors import UserError
from train.record.log import only_warnings
from train.record.provenance import git_commit
from train.report.compare import Comparison, as_json, write_csv
from train.report.compare_page import write_page, write_png
from train.tracking.facts import RUNNING, RunFacts
from train.tracking.mlflow_upload import Upload
from train.tracking.uploader import flatten

PARENT_TAG = "mlflow.parentRunId"
PAGE, PICTURE, TABLE, FIGURES = "comparison.html", "comparison.png", "comparison.csv", "comparison.json"
TIMINGS = "timings.jsonl"


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes page, PNG, CSV and JSON of a comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    write_page(comparison, folder / PAGE)
    write_png(comparison, folder / PICTURE)
    write_csv(comparison, folder / TABLE)
    (folder / FIGURES).write_text(as_json(comparison))


@only_warnings()
def send(ladder: Ladder, label: str, folder: Path, runs: Sequence[Run], *, is_complete: bool) -> None:
    """Sends the parent, then every complete run as its child; may be repeated.

    Raises:
        UploadError: if the server rejects it; everything stays on disk.
    """
    parent = _send_parent(ladder, label, folder, is_complete=is_complete)
    for run in tqdm(runs, desc="MLflow", unit="run", dynamic_ncols=True):
        run_dir = Path(run.recipe.runs_dir) / run.recipe.name
        facts = RunFacts.read(run_dir)
        tags = facts.tags | {
            PARENT_TAG: parent,
            "ladder.family": run.family,
            "ladder.size": run.size,
            "ladder.is_search": str(run.is_search),
        }
        dataclasses.replace(facts, tags=tags).write(run_dir)
        Upload(run_dir).sync()


def _send_parent(ladder: Ladder, label: str, folder: Path, *, is_complete: bool) -> str:
    try:
        facts = RunFacts.read(folder)
    except UserError:
        facts = RunFacts(
            uid=uuid.uuid4().hex,
            name=label,
            uri="",
            experiment=label,
            params=flatten(dataclasses.asdict(ladder)),
            tags={"mlflow.source.name": "launch/ladder", "mlflow.source.git.commit": git_commit()},
            datasets=[],
            artifacts=[PAGE, PICTURE, TABLE, FIGURES, TIMINGS],
            started_ms=round(time.time() * 1000),
        )
    dataclasses.replace(facts, status="FINISHED" if is_complete else RUNNING).write(folder)
    upload = Upload(folder)
    upload.sync()
    return upload.state.run_id
