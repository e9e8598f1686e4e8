"""The folder of a run: claimed once, resumed by the same recipe, never overwritten unless asked."""

import dataclasses
import json
import shutil
from pathlib import Path

from train.recipe.catalogue import on_resume
from train.recipe.errors import UserError
from train.recipe.keys import OnResume
from train.recipe.reading import load_recipe, to_read_dict, to_yaml
from train.recipe.schema import OnExisting, Recipe
from train.record.files import write_json, write_whole
from train.record.lease import GRACE_SECONDS, LEASE_FOLDER, hold, release

DATA_FILE = "data.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
DATA_LOG_FILE = "data_log.jsonl"
OLD_DATA_LOG_FILE = "ledger.jsonl"
"""Former name of the data log, in runs begun before this release; resuming such a run renames it."""
SKIPS_FILE = "skips.json"
SAVED_FILE = "saved.json"
"""The newest checkpoint that was written, whether or not it is still there."""
SUMMARY_FILE = "summary.json"
MLFLOW_FILE = "mlflow.json"
"""State of the run's upload to MLflow."""
EVALUATION_FILE = "evaluation.json"
SAMPLE_FILE = "sample.txt"
REPORT_FILE = "report.html"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run's folder and its recipe, with the name that the run got."""

    folder: Path
    recipe: Recipe
    is_complete: bool


def claim_run_folder(recipe: Recipe, grace_seconds: float = GRACE_SECONDS) -> Claim:
    """Finds or creates the folder of this run; to be called by one rank only.

    If the folder exists, ``on_existing`` decides: see :class:`train.recipe.schema.OnExisting`. A run with a
    summary is complete. Any other is this process's until :func:`train.record.lease.release`, or its end.

    Args:
        recipe: the run's recipe.
        grace_seconds: how long to wait for another process of this host that is still in the run.

    Raises:
        UserError: if the folder holds a run of another recipe, another process is training in it, or it can't
            be written.
    """
    root = Path(recipe.runs_dir)
    folder = root / recipe.name
    try:
        if recipe.on_existing is OnExisting.overwrite and _is_begun(folder):
            _refuse_foreign(folder)
            _hold(folder, grace_seconds)
            _empty(folder)
        if recipe.on_existing is OnExisting.new:
            number = 1
            while (folder / SUMMARY_FILE).exists():
                number += 1
                folder = root / f"{recipe.name}-{number}"
            recipe = dataclasses.replace(recipe, name=folder.name)
        if _is_begun(folder):
            _refuse_foreign(folder)
            _refuse_other_recipe(recipe, folder)
            if (folder / SUMMARY_FILE).exists():
                return Claim(folder, recipe, True)
        _hold(folder, grace_seconds)
        try:
            _take(recipe, folder)
        except BaseException:
            release(folder)
            raise
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} can't be written ({error.strerror})",
            key="runs_dir",
            remedy="name a folder on a disk with room that you may write to",
        ) from None
    return Claim(folder, recipe, (folder / SUMMARY_FILE).exists())


def data_log_of(folder: Path) -> Path:
    """Returns the path of a run's data log, under its former name if the run is that old."""
    old = folder / OLD_DATA_LOG_FILE
    return old if old.is_file() else folder / DATA_LOG_FILE


def require_resumption(recipe: Recipe) -> None:
    """Refuses automatic restarts of a run that would start from scratch each time.

    Raises:
        UserError: if the recipe says `on_existing: overwrite`.
    """
    if recipe.on_existing is OnExisting.overwrite:
        raise UserError(
            "is overwrite: each restart would discard the previous attempt's progress",
            key="on_existing",
            remedy="use resume; to start again, remove the run's folder or use another name",
        )


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Writes the accepted recipe to the run's folder."""
    write_whole(folder / RECIPE_FILE, to_yaml(recipe))


def note_saved(folder: Path, batch: int) -> None:
    """Notes in the run's folder that there is a checkpoint of this batch, so that their loss is noticed."""
    write_json(folder / SAVED_FILE, {"batch": batch})


def last_saved(folder: Path) -> int | None:
    """Returns the batch of the newest checkpoint that was written; None if the run is older than this note.

    A damaged note counts as none.
    """
    try:
        batch = json.loads((folder / SAVED_FILE).read_bytes())["batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return batch if isinstance(batch, int) else None


def require_same_data(folder: Path, digests: dict[str, str]) -> None:
    """Records which shards a run reads and refuses others on resume; domains may be added.

    Args:
        folder: the run's folder.
        digests: content hash of the shards of each domain and split, by name.

    Raises:
        UserError: if the run was started with other shards.
    """
    file = folder / DATA_FILE
    before = _read_digests(file) if file.is_file() else {}
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            raise UserError(
                f"contains {digest[:12]} for {name}, but {folder} was started with {before[name][:12]}",
                key="data.shards",
                remedy="restore the old shards, or give the run another name",
            )
    write_json(file, before | digests, sort_keys=True)


def _read_digests(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise UserError(
            f"{file} is damaged",
            remedy="restore it; without it the run would accept other data than it has read",
        )
    return found


def _hold(folder: Path, grace_seconds: float) -> None:
    hold(
        folder,
        key="name",
        remedy="wait for its end, end it, or give this run another name",
        grace_seconds=grace_seconds,
    )


def _take(recipe: Recipe, folder: Path) -> None:
    """Continues or begins the run in a folder that this process holds."""
    if not _is_begun(folder):
        note_saved(folder, 0)
        keep_recipe(recipe, folder)
        return
    # Another process may have begun the run since.
    _refuse_foreign(folder)
    _refuse_other_recipe(recipe, folder)
    if (folder / OLD_DATA_LOG_FILE).is_file():
        (folder / OLD_DATA_LOG_FILE).rename(folder / DATA_LOG_FILE)


def _is_begun(folder: Path) -> bool:
    """Returns whether a folder holds anything but what a start leaves that was ended in its first moment."""
    own = (LEASE_FOLDER, SAVED_FILE)
    return folder.exists() and any(
        path.name not in own and not path.name.endswith(".partial") for path in folder.iterdir()
    )


def _empty(folder: Path) -> None:
    """Removes a run but for its lease; its recipe last, without which the folder would be nobody's."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECIPE_FILE):
        if path.name == LEASE_FOLDER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_foreign(folder: Path) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"{folder} exists and is not a run folder", key="name", remedy="choose another name or runs_dir"
        )


def _refuse_other_recipe(recipe: Recipe, folder: Path) -> None:
    """Raises if the folder's recipe would train something else."""
    # Unread keys are not kept with the run, so they must not be compared.
    before = _flat(to_read_dict(load_recipe(folder / RECIPE_FILE)))
    now = _flat(to_read_dict(recipe))
    for key in sorted(before.keys() | now.keys()):
        if on_resume(key) is OnResume.never and before.get(key) != now.get(key):
            raise UserError(
                f"is {now.get(key)}, but {folder} was started with {before.get(key)}",
                key=key,
                remedy="give the run another name, or set on_existing=overwrite to start it again",
            )


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()
    }
