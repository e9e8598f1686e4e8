"""Evaluation results in a run's folder: one file with a record per kind, name and checkpoint.

Needs no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.recipe.errors import UserError
from train.record.files import write_json
from train.record.run_folder import EVALUATION_FILE, METRICS_FILE
from train.record.step_log import STEP, StepLog, read_steps

SUITE, HARNESS, RETRIEVAL, BITS = "suite", "harness", "retrieval", "bits_per_byte"
"""Kinds of records."""
KEY = ("kind", "name", "batch")


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """Reads all records, in the order in which they were first written; none if there is no file.

    Raises:
        UserError: if the file is damaged.
    """
    path = run_dir / EVALUATION_FILE
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_bytes())
    except ValueError:
        records = None
    if not isinstance(records, list) or not all(
        isinstance(it, dict) and it.keys() >= set(KEY) for it in records
    ):
        raise UserError(
            f"{path} is damaged", remedy="restore it, or remove it: what it holds is evaluated again"
        )
    return records


def add_result(run_dir: Path, kind: str, name: str, batch: int | None, fields: Mapping[str, Any]) -> Path:
    """Adds a record, replacing one of the same kind, name and checkpoint; atomic.

    Args:
        run_dir: folder of the run.
        kind: one of the kinds above.
        name: for example the suite's name.
        batch: batches that the model was trained for; None if unknown.
        fields: the record's contents.
    """
    record = {"kind": kind, "name": name, "batch": batch, **fields}
    kept = [r for r in read_results(run_dir) if any(r[key] != record[key] for key in KEY)]
    return write_json(run_dir / EVALUATION_FILE, [*kept, record])


def drop_results_after(run_dir: Path, batch: int) -> None:
    """Removes the results of checkpoints later than the one that the run resumes from."""
    records = read_results(run_dir)
    kept = [r for r in records if r["batch"] is None or r["batch"] <= batch]
    if len(kept) < len(records):
        write_json(run_dir / EVALUATION_FILE, kept)


def add_metrics(run_dir: Path, batch: int | None, figures: Mapping[str, float]) -> bool:
    """Adds metrics to the last step of a run's record; returns False if they are not of that step."""
    path = run_dir / METRICS_FILE
    steps = read_steps(path)
    if batch is None or not steps or batch != steps[-1][STEP]:
        return False
    log = StepLog(path)
    log.drop_after(batch)
    log.write(batch, dict(figures))
    log.close()
    return True
