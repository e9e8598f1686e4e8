"""The folder of a run: claimed once, resumed by the same recipe, never overwritten but moved aside."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from train.recipe.catalogue import on_resume
from train.recipe.errors import UserError
from train.recipe.keys import OnResume
from train.recipe.reading import load_recipe, to_read_dict, to_yaml
from train.recipe.schema import OnExisting, Recipe
from train.record.files import write_json, write_whole
from train.record.lease import GRACE_SECONDS, LEASE_FOLDER, hold, release
from train.record.log import progress
from train.record.step_log import read_steps

DATA_FILE = "data.json"
TOKENIZER = "tokenizer"
"""Name of the tokenizer's fingerprint among the digests of the shards that a run has read."""
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
DATA_LOG_FILE = "data_log.jsonl"
OLD_DATA_LOG_FILE = "ledger.jsonl"
"""Former name of the data log, in runs begun before this release; resuming such a run renames it."""
ALARMS_FILE = "alarms.jsonl"
SKIPS_FILE = "skips.json"
SAVED_FILE = "saved.json"
"""The newest checkpoint that was written, whether or not it is still there."""
SUMMARY_FILE = "summary.json"
MLFLOW_FILE = "mlflow.json"
"""State of the run's upload to MLflow."""
EVALUATION_FILE = "evaluation.json"
SAMPLE_FILE = "sample.txt"
REPORT_FILE = "report.html"
LOAD_PICTURE_FILE = "expert_load.png"
CHECKPOINTS_FOLDER = "checkpoints"
REPLACED = "replaced-"
"""In the name of the folder of a run that was overwritten, before its number."""


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
            _move_aside(folder)
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


def in_place(recipe: Recipe, file: Path, overrides: Sequence[str]) -> Recipe:
    """Returns the recipe of a run's folder with the name and the place that the folder now has.

    The folder may have been copied, renamed or moved; what it trains on then is itself.

    Args:
        recipe: read from ``file`` with the overrides.
        file: a recipe; one that is not a run's own is left as it is.
        overrides: ``key=value`` strings, which win.
    """
    folder = file.parent if file.parent.name else file.parent.resolve()
    if file.name != RECIPE_FILE or not any((folder / name).exists() for name in (SAVED_FILE, METRICS_FILE)):
        return recipe
    given = {text.partition("=")[0].strip() for text in overrides}
    return dataclasses.replace(
        recipe,
        name=recipe.name if "name" in given else folder.name,
        runs_dir=recipe.runs_dir if "runs_dir" in given else str(folder.parent),
    )


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
            remedy="use resume; to start again, use another name",
        )


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Writes the accepted recipe to the run's folder, atomically and to the disk."""
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


def batches_of(root: Path) -> dict[int, Path]:
    """Returns the folders of checkpoints by batch, newest first; whatever else is there is none."""
    found = {
        int(match[1]): path
        for path in root.glob("batch-*")
        if (match := re.fullmatch(r"batch-(\d+)", path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def require_same_data(folder: Path, digests: dict[str, str]) -> dict[str, str]:
    """Refuses other shards on resume than a run has read; domains may be added.

    Args:
        folder: the run's folder.
        digests: content hash of the shards of each domain and split, and of the tokenizer, by name.

    Returns:
        Those of all shards that it has read or reads now.

    Raises:
        UserError: if the run was started with other shards.
    """
    before = read_digests(folder)
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            raise UserError(
                f"contains {digest[:12]} for {name}, but {folder} was started with {before[name][:12]}",
                key="data.shards",
                remedy="restore the old shards, or give the run another name",
            )
    return before | digests


def keep_data(folder: Path, digests: dict[str, str]) -> None:
    """Records which shards a run reads, see :func:`require_same_data`."""
    write_json(folder / DATA_FILE, require_same_data(folder, digests), sort_keys=True)


def has_trained(folder: Path) -> bool:
    """Returns whether a run has trained anything, or taken it over from the run that it forks."""
    return (
        (folder / SUMMARY_FILE).exists()
        or bool(last_saved(folder))
        or bool(batches_of(folder / CHECKPOINTS_FOLDER))
        or any(read_steps(log) for log in (folder / METRICS_FILE, data_log_of(folder)))
    )


def read_digests(folder: Path) -> dict[str, str]:
    """Returns what a run has read, see :func:`require_same_data`; nothing if it has not begun.

    Raises:
        UserError: if the record is damaged.
    """
    file = folder / DATA_FILE
    if not file.is_file():
        return {}
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
        path.name not in own and not path.name.endswith(".partial") and not path.name.startswith(REPLACED)
        for path in folder.iterdir()
    )


def _move_aside(folder: Path) -> None:
    """Moves a run that is overwritten out of its folder, which this process holds, and says where to.

    The folder itself stays: it may be a link or a mount point. Its recipe is moved last, so that a move that
    was interrupted is continued by the next.
    """
    is_plain = not folder.is_symlink() and not os.path.ismount(folder)
    number = 1
    while (aside := _replaced(folder, number, is_plain)).exists() and (aside / RECIPE_FILE).exists():
        number += 1
    aside.mkdir(exist_ok=True)
    last = (SAVED_FILE, RECIPE_FILE)
    paths = [path for path in folder.iterdir() if not path.name.startswith((REPLACED, LEASE_FOLDER))]
    for path in sorted(paths, key=lambda path: last.index(path.name) if path.name in last else -1):
        path.rename(aside / path.name)
    progress.warning(f"the run that was in {folder} is now in {aside}")


def _replaced(folder: Path, number: int, is_plain: bool) -> Path:
    """Returns a folder on the same file system for what was in a folder."""
    name = f"{REPLACED}{number}"
    return folder.with_name(f"{folder.name}.{name}") if is_plain else folder / name


def _refuse_foreign(folder: Path) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"{folder} exists and is not a run folder", key="name", remedy="choose another name or runs_dir"
        )


def _refuse_other_recipe(recipe: Recipe, folder: Path) -> None:
    """Raises if the folder's run was trained by a recipe that would train something else."""
    # Unread keys are not kept with the run, so they must not be compared.
    before = _flat(to_read_dict(load_recipe(folder / RECIPE_FILE)))
    now = _flat(to_read_dict(recipe))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if on_resume(key) is OnResume.never and before.get(key) != now.get(key)
    ]
    if not changed or not has_trained(folder):
        return
    key = changed[0]
    more = f" (and {len(changed) - 1} other keys)" if len(changed) > 1 else ""
    fork = "" if key.startswith("start.") else f", or fork it: name=NEW start.run={folder}"
    if not batches_of(folder / CHECKPOINTS_FOLDER):
        fork = ", or set on_existing=overwrite, which moves it aside"
    raise UserError(
        f"is {now.get(key)}, but {folder} was started with {before.get(key)}{more}",
        key=key,
        remedy=f"give the run another name{fork}",
    )


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()
    }
