"""Renames, copies and removes runs, and keeps MLflow in step.

The folder comes first: where MLflow's server does not answer, its part is a line that says what remains to be
done. A run that a process trains in is never touched.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.names import unfit_as_file
from train.record import log
from train.record.files import write_json, write_whole
from train.record.lease import LEASE_FOLDER, follow_rename, hold, release, seen_holder
from train.record.place import PLACE_FILE, note_place
from train.record.run_folder import MLFLOW_FILE, RECIPE_FILE, REPORT_FILE, SUMMARY_FILE
from train.report.run_page import write_report
from train.tracking.facts import FACTS_FILE, RunFacts, renew_identity
from train.tracking.mlflow_upload import LOCK_FILE, Upload, UploadError
from train.tracking.store import exclusive
from train.tracking.uploader import short_path, store_of, upload_command

REMOVING = ".removing"
NOT_COPIED = (LEASE_FOLDER, PLACE_FILE, MLFLOW_FILE, LOCK_FILE)


def rename(folder: Path, name: str) -> Path:
    """Renames a run: its folder, in its records, and in MLflow; returns the new folder.

    Raises:
        UserError: if a process trains in it, or the name is taken or no name of a folder.
    """
    renamed = _free(folder, name)
    with _held(folder):
        place = folder.resolve()
        folder.rename(renamed)
        follow_rename(place, renamed)
        try:
            _set_name(renamed)
            note_place(renamed)
        finally:
            release(renamed)
    update_mlflow(renamed)
    return renamed


def copy(folder: Path, name: str) -> Path:
    """Copies a run, with its checkpoints, to a run of its own; returns its folder.

    Raises:
        UserError: if a process trains in it, or the name is taken or no name of a folder.
    """
    copied = _free(folder, name)
    holder = seen_holder(folder)
    if holder is not None:
        raise UserError(
            f"{folder} is in use by {holder}",
            remedy=f"wait for its end, or fork it: name={name} start.run={short_path(folder)}",
        )
    partial = copied.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(*NOT_COPIED, "*.partial"))
    if (partial / FACTS_FILE).is_file():
        renew_identity(partial, RunFacts.read(partial))
    partial.rename(copied)
    _set_name(copied)
    note_place(copied)
    if (folder / MLFLOW_FILE).is_file():
        _send(copied)
    return copied


def remove(folder: Path, *, keeps_mlflow: bool = False) -> None:
    """Removes a run with everything in its folder, and its MLflow run, as MLflow's page does.

    Args:
        folder: the run's folder.
        keeps_mlflow: leave the MLflow run as it is.

    Raises:
        UserError: if a process trains in it.
    """
    with _held(folder):
        if not keeps_mlflow and (folder / MLFLOW_FILE).is_file():
            _delete_in_mlflow(folder)
        target = folder.resolve()
        # Without its recipe it is no run any more, even if the removal is interrupted.
        (folder / RECIPE_FILE).rename(folder / f"{RECIPE_FILE}{REMOVING}")
    shutil.rmtree(target)
    if folder.is_symlink():
        folder.unlink()


def update_mlflow(folder: Path) -> None:
    """Sends a run's name, tags and records to MLflow, if it was ever sent there; says so if that fails."""
    if (folder / MLFLOW_FILE).is_file():
        _send(folder)


def _send(folder: Path) -> None:
    try:
        with log.only_warnings(), exclusive(folder / LOCK_FILE, wait=False):
            Upload(folder).sync()
    except BlockingIOError:
        pass  # The process that sends a run in training sends this too.
    except UploadError as error:
        place = store_of(folder, RunFacts.read(folder))
        log.progress.warning(
            f"tracking: {place} does not accept it ({error}); later: {upload_command(folder)}"
        )


def _delete_in_mlflow(folder: Path) -> None:
    try:
        with log.only_warnings():
            run_id = Upload(folder).delete()
    except UploadError as error:
        place = store_of(folder, RunFacts.read(folder))
        log.progress.warning(
            f"tracking: {place} does not accept it ({error}); delete the run {folder.name} on its page"
        )
        return
    if run_id:
        log.progress.info(
            f"MLflow run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` restores it"
        )


def _free(folder: Path, name: str) -> Path:
    """Returns the folder of another name next to a run's."""
    if unfit := unfit_as_file(name):
        raise UserError(f"{name!r} is not a folder name: it {unfit}", remedy="use letters, digits, - and _")
    other = folder.with_name(name)
    if other.exists() or other.is_symlink():
        raise UserError(f"{other} exists", remedy="choose another name")
    return other


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds a run, so that no process trains in it meanwhile."""
    hold(folder, key="", remedy="wait for its end, or end it")
    try:
        yield
    finally:
        release(folder)


def _set_name(folder: Path) -> None:
    """Writes the folder's name into the run's records; the recipe's other lines stay as they are."""
    recipe = folder / RECIPE_FILE
    line = "name: " + json.dumps(folder.name, ensure_ascii=False)
    write_whole(recipe, re.sub(r"(?m)^name:.*$", lambda _: line, recipe.read_text(), count=1))
    if (folder / SUMMARY_FILE).is_file():
        summary = json.loads((folder / SUMMARY_FILE).read_bytes())
        write_json(folder / SUMMARY_FILE, summary | {"name": folder.name})
    if (folder / REPORT_FILE).is_file():
        write_report(folder)
