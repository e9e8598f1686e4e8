"""An overview of a run from the files of its folder, quickly: of its logs only the last lines are read."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from train.recipe.errors import UserError
from train.recipe.scalars import read_yaml
from train.record import metrics
from train.record.changes import fork_of, read_changes
from train.record.lease import seen_holder
from train.record.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, RECIPE_FILE, batches_of
from train.record.step_log import STEP, TIMESTAMP, TOKENS
from train.record.summary import read_summary
from train.record.tags import read_tags

TAIL_BYTES = 1 << 18
"""Bytes of a log's end that hold its last lines."""


@dataclass(frozen=True)
class Overview:
    """A run at a glance."""

    name: str
    state: str
    """``complete``, ``training`` (a process holds it), ``stopped``, ``new`` (no step yet), or ``damaged``."""
    holder: str = ""
    """The process that holds it."""
    batches: int = 0
    tokens: int = 0
    duration_tokens: int | None = None
    loss: float | None = None
    """Newest training loss, nats per token."""
    validation_loss: float | None = None
    """Newest validation loss, mean of the domains, nats per token; None if none is near the log's end."""
    last_time: float | None = None
    """When the last step was recorded, in seconds since 1970."""
    checkpoints: list[int] = field(default_factory=list)
    """Batches."""
    fork_of: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for ``--json``."""
        return asdict(self)


def find_run(text: str, runs_dir: Path) -> Path:
    """Returns the folder of a run, named by its folder or, below ``runs_dir``, by its name.

    Raises:
        UserError: if there is no such run.
    """
    for folder in (Path(text), runs_dir / text):
        if (folder / RECIPE_FILE).is_file():
            return folder if folder.name else folder.resolve()
    raise UserError(
        f"there is no run {text}, neither as a folder nor in {runs_dir}",
        remedy="python -m train.runs list shows what there is",
    )


def runs_in(runs_dir: Path) -> list[Path]:
    """Returns the folders of runs directly below a folder, by name.

    Raises:
        UserError: if it is no folder.
    """
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is no folder", key="--runs-dir", remedy="name the folder of the runs")
    return sorted(file.parent for file in runs_dir.glob(f"*/{RECIPE_FILE}"))


def overview_of(folder: Path) -> Overview:
    """Reads a run's folder; one whose records are damaged is shown as such."""
    try:
        return _overview_of(folder)
    except (UserError, yaml.YAMLError, OSError, ValueError) as error:
        return Overview(folder.name, "damaged", holder=" ".join(str(error).split()))


def _overview_of(folder: Path) -> Overview:
    recipe = read_yaml((folder / RECIPE_FILE).read_text())
    training = recipe.get("training") if isinstance(recipe, dict) else None
    written = str(training.get("duration_tokens")) if isinstance(training, dict) else ""
    duration = int(written) if written.isdecimal() else None
    lines = last_lines(folder / METRICS_FILE)
    last = lines[-1] if lines else {}
    summary, holder = read_summary(folder), seen_holder(folder)
    state = "new" if not lines else "stopped"
    if holder is not None:
        state = "training"
    if summary is not None:
        state = "complete"
    fork = fork_of(read_changes(folder))
    return Overview(
        name=folder.name,
        state=state,
        holder=str(holder or ""),
        batches=int(last.get(STEP, 0)),
        tokens=int(last.get(TOKENS, 0)),
        duration_tokens=duration,
        loss=last.get(metrics.LOSS),
        validation_loss=_validation_loss(lines),
        last_time=last.get(TIMESTAMP),
        checkpoints=sorted(batches_of(folder / CHECKPOINTS_FOLDER)),
        fork_of=f"{fork.fork_of} at batch {fork.batch}" if fork else "",
        tags=read_tags(folder),
    )


def last_lines(log: Path) -> list[dict[str, Any]]:
    """Returns the readable lines at the end of a step log; none if there is no file."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
        content = stream.read()
    found = []
    for line in content.splitlines(keepends=True):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue  # The first is cut, the last may be in the making.
        if line.endswith(b"\n") and isinstance(fields, dict) and isinstance(fields.get(STEP), int):
            found.append(fields)
    return found


def _validation_loss(lines: list[dict[str, Any]]) -> float | None:
    for line in reversed(lines):
        keys = metrics.match_names(metrics.LOSS_VALIDATION, list(line)).values()
        values = [line[key] for key in keys if isinstance(line[key], int | float)]
        if values:
            return float(sum(values) / len(values))
    return None
