"""Fork: a new run that continues from another run's checkpoint as if it had been that run so far.

The checkpoint is linked into the new run's folder, together with the records of the steps before it. From
there on the new run is resumed like any other, and needs the old one no more. Of the old run nothing is
written: the files of checkpoints never change, and a link keeps them even when that run removes its own.
"""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from data.opened import OpenedData
from data.order.epoch_budget import require_epoch_budget
from train.checkpoint.files import (
    PARTIAL,
    Progress,
    newest_whole_checkpoint,
    read_progress,
)
from train.layout.ranks import log_on_rank_0, run_on_rank_0
from train.recipe.curriculum import continue_stages, from_json
from train.recipe.errors import UserError
from train.recipe.topology import Topology
from train.record.changes import Change, differences, keys_at, keys_of, read_changes, write_changes
from train.record.evaluations import drop_results_after
from train.record.run_folder import (
    CHECKPOINTS_FOLDER,
    DATA_FILE,
    DATA_LOG_FILE,
    EVALUATION_FILE,
    SKIPS_FILE,
    batches_of,
    data_log_of,
    last_saved,
    note_saved,
    require_same_data,
)
from train.record.skips import declared_skips
from train.record.step_log import StepLog
from train.start.resume import RECORDS, data_digests


def fork_if_new(opened: OpenedData, folder: Path, topology: Topology) -> None:
    """Takes over the checkpoint that ``start.run`` names, unless the run has begun; every rank calls it.

    Args:
        opened: the data of the new run's recipe.
        folder: the new run's folder.
        topology: this rank.

    Raises:
        UserError: if the old run has no such checkpoint, or the recipe would rewrite what it has read.
    """
    recipe = opened.recipe
    if recipe.start.run is None or not run_on_rank_0(topology, lambda: _is_new(folder)):
        return
    source = Path(recipe.start.run)
    root = source / CHECKPOINTS_FOLDER
    found, complaints = newest_whole_checkpoint(root, topology, batch=recipe.start.batch)
    for complaint in complaints:
        log_on_rank_0(topology, complaint)
    if found is None:
        which = f"checkpoint of batch {recipe.start.batch}" if recipe.start.batch else "checkpoint"
        raise UserError(f"{source} has no complete {which}", key="start.run", remedy="name another")
    run_on_rank_0(topology, lambda: _fork(opened, folder, source, found))


def _is_new(folder: Path) -> bool:
    return not last_saved(folder) and not batches_of(folder / CHECKPOINTS_FOLDER)


def _fork(opened: OpenedData, folder: Path, source: Path, checkpoint: Path) -> None:
    """Checks the recipe against what was read, then takes over records and checkpoint; the latter is last."""
    recipe, progress = opened.recipe, read_progress(checkpoint)
    _require_future(opened, source, progress)
    keys = tuple(differences(keys_at(source, progress.batch), keys_of(recipe)))
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    change = Change(progress.batch, progress.tokens, now, recipe.name, str(source), keys)
    for name in (SKIPS_FILE, DATA_FILE, EVALUATION_FILE):
        _copy(source / name, folder / name)
    for name in RECORDS:
        _copy(data_log_of(source) if name == DATA_LOG_FILE else source / name, folder / name)
        if (folder / name).exists():
            log = StepLog(folder / name)
            log.drop_after(progress.batch)
            log.close()
    drop_results_after(folder, progress.batch)
    past = [each for each in read_changes(source) if each.batch <= progress.batch]
    write_changes(folder, [*past, change])
    _link(checkpoint, folder / CHECKPOINTS_FOLDER / checkpoint.name)
    note_saved(folder, progress.batch)


def _require_future(opened: OpenedData, source: Path, progress: Progress) -> None:
    """Raises if the recipe would rewrite what the old run has read up to a checkpoint."""
    recipe = opened.recipe
    if progress.curriculum is None:
        raise UserError(f"{source} is from a version that can't be forked", key="start.run")
    past = from_json(progress.curriculum)
    curriculum = continue_stages(past, recipe, progress.samples)
    curriculum = replace(curriculum, skips=declared_skips(recipe, source))
    if past.skipped_before(progress.batch) != curriculum.skipped_before(progress.batch):
        raise UserError(
            f"skips other positions than {source} did before batch {progress.batch}",
            key="data.skips",
            remedy="skip what it skipped, and later positions",
        )
    require_same_data(source, data_digests(opened))
    require_epoch_budget(recipe, curriculum, opened.plan(curriculum))


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)


def _link(checkpoint: Path, target: Path) -> None:
    """Makes a checkpoint of the same files, complete or not at all; copies them to another file system."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)

    def link(source: str, name: str) -> None:
        try:
            os.link(source, name)
        except OSError:
            shutil.copyfile(source, name)

    try:
        shutil.copytree(checkpoint, partial, copy_function=link)
        partial.rename(target)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{checkpoint} can't be taken over to {target} ({type(error).__name__})",
            key="start.run",
            remedy="start again: a run that is being trained may just have removed it",
        ) from None
