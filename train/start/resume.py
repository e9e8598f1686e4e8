"""Resume: the newest valid checkpoint, the remaining stages, and checks against what was already read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from data.opened import OpenedData
from data.order.epoch_budget import require_epoch_budget
from train.checkpoint.files import (
    ASIDE,
    STATE_FOLDER,
    Progress,
    newest_whole_checkpoint,
    read_progress,
    restore_random_states,
    set_aside,
)
from train.checkpoint.groups import first_difference, hyperparameters_of, read_hyperparameters
from train.checkpoint.loading import load_checkpoint
from train.checkpoint.memory_files import layout_digest
from train.checkpoint.memory_reader import MemoryCopy, find_copy
from train.hf.initial_weights import find_start, require_moments, start_from
from train.layout.mesh import replicas_of
from train.layout.ranks import log_on_rank_0, run_on_rank_0
from train.recipe.curriculum import Curriculum, continue_stages, from_json, plan_stages
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record.changes import Change, add_change, differences, keys_of
from train.record.host_memory import forget
from train.record.log import progress as progress_log
from train.record.run_folder import (
    ALARMS_FILE,
    CHECKPOINTS_FOLDER,
    DATA_LOG_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    TOKENIZER,
    batches_of,
    keep_data,
    keep_recipe,
    last_saved,
    note_saved,
    require_same_data,
)
from train.record.skips import declared_skips
from train.record.step_log import EXPERT_LOAD_FILE, STEP, StepLog, read_steps
from train.step.language_model import LanguageModel

RECORDS = (METRICS_FILE, DATA_LOG_FILE, ALARMS_FILE, EXPERT_LOAD_FILE)
"""The logs of a run that have a line per step, and are cut off at the checkpoint that it resumes from."""


@dataclass(frozen=True)
class Resumed:
    """The point that a run resumes from."""

    checkpoint: Path | None
    """The newest on the file system, if there is any."""
    progress: Progress
    curriculum: Curriculum
    memory: MemoryCopy | None = None
    """The copy in the hosts' memory that it resumes from instead, as it is newer."""

    @property
    def is_resumed(self) -> bool:
        """True if there is a state to load."""
        return self.checkpoint is not None or self.memory is not None

    def restore_random_states(self, topology: Topology) -> None:
        """Restores this rank's random-number states, just before training continues."""
        if self.memory is not None:
            self.memory.restore_random_states()
        elif self.checkpoint is not None:
            restore_random_states(self.checkpoint, topology)


def find_checkpoint(recipe: Recipe, folder: Path, topology: Topology) -> Resumed:
    """Finds the run's newest complete state and the stages from there, as the recipe now has them.

    That is a checkpoint, or a copy in the hosts' memory that is as new. A checkpoint whose batches no longer
    match the skips of recipe and guard is set aside for an older one.

    Raises:
        UserError: if the recipe would rewrite what the run has read, no checkpoint is old enough for a
            changed skip, or all of the run's checkpoints are gone.
    """
    skips = declared_skips(recipe, folder)
    refused: list[Path] = []

    def has_skipped_others(progress: Progress) -> bool:
        past = from_json(progress.curriculum) if progress.curriculum else plan_stages(recipe)
        now = replace(past, skips=skips)
        return past.skipped_before(progress.batch) != now.skipped_before(progress.batch)

    def refuse(checkpoint: Path) -> str:
        if not has_skipped_others(read_progress(checkpoint)):
            return ""
        refused.append(checkpoint)
        return f"{checkpoint}: skipped other positions than the recipe does now"

    def refuse_copy(progress: Progress) -> str:
        what = f"the copy in memory of batch {progress.batch}"
        if has_skipped_others(progress):
            return f"{what}: skipped other positions than the recipe does now"
        # The last state has to be on the file system.
        past = from_json(progress.curriculum) if progress.curriculum else plan_stages(recipe)
        is_last = progress.batch >= continue_stages(past, recipe, progress.samples).batches
        return f"{what}: nothing is left to train" if is_last else ""

    found, complaints = newest_whole_checkpoint(folder / CHECKPOINTS_FOLDER, topology, refuse)
    for complaint in complaints:
        log_on_rank_0(topology, complaint)
    newest = read_progress(found) if found is not None else Progress(0, 0, 0, 0.0)
    copy = _find_copy(recipe, folder, topology, newest.batch, refuse_copy)
    if refused and found is None and copy is None:
        raise UserError(
            f"{folder} has no complete checkpoint from before the changed skips",
            key="data.skips",
            remedy="skip later positions, or give the run another name",
        )
    run_on_rank_0(topology, lambda: set_aside(refused))
    if found is None and copy is None:
        run_on_rank_0(topology, lambda: set_unsaved_aside(recipe, folder))
        return Resumed(None, newest, replace(plan_stages(recipe), skips=skips))
    if found is not None:
        run_on_rank_0(topology, lambda: _note_found(folder, newest.batch))
    progress = newest if copy is None else copy.progress
    past = from_json(progress.curriculum) if progress.curriculum else plan_stages(recipe)
    curriculum = replace(continue_stages(past, recipe, progress.samples), skips=skips)
    if len(curriculum.edits) > len(past.edits):
        log_on_rank_0(topology, f"the curriculum is edited from token {progress.tokens:,}")
    return Resumed(found, progress, curriculum, copy)


def _find_copy(
    recipe: Recipe, folder: Path, topology: Topology, newest: int, refuse: Callable[[Progress], str]
) -> MemoryCopy | None:
    """Finds the copy in the hosts' memory that is as new as the newest checkpoint or newer, if there is one.

    Whoever removes a run's newest checkpoints wants to go back: then copies do not count.
    """
    if recipe.checkpoint.memory_interval_batches is None:
        forget(folder)
        return None
    if run_on_rank_0(topology, lambda: _is_gone(folder, newest)):
        return None
    layout = layout_digest(recipe, topology.world_size)
    copy, complaints = find_copy(folder, layout, topology, max(newest, 1), refuse)
    for complaint in complaints:
        log_on_rank_0(topology, complaint)
    return copy


def set_unsaved_aside(recipe: Recipe, folder: Path) -> None:
    """Prepares a run without a complete checkpoint to begin: keeps the records of what it has trained before.

    Raises:
        UserError: if it once had a checkpoint: a file system may not be mounted, and the run must not begin
            again because of that. Checkpoints that a recheck has set aside are there.
    """
    trained = max((steps[-1][STEP] for name in RECORDS if (steps := read_steps(folder / name))), default=0)
    saved, every = last_saved(folder) or 0, recipe.checkpoint.interval_batches
    root = folder / CHECKPOINTS_FOLDER
    if not trained and not saved:
        return
    is_set_aside = not batches_of(root) and any(root.glob(f"{ASIDE}*"))
    # Two intervals and no save: the run is older than the note of saves, or all failed. A person must look.
    is_missed = saved or batches_of(root) or (every is not None and trained >= 2 * every)
    if is_missed and not is_set_aside:
        raise UserError(
            f"{folder} has trained {max(trained, saved)} batches, but {root} has no complete checkpoint",
            key="name",
            remedy="bring the checkpoints back (is a file system not mounted?), or begin again under another "
            "name",
        )
    number = 1
    while (aside := folder / f"unsaved-{number}").exists():
        number += 1
    aside.mkdir()
    for name in RECORDS:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    progress_log.warning(
        f"{folder} had trained {trained} batches and saved none: it begins again, and {aside} keeps their "
        "records"
    )


def accept(opened: OpenedData, folder: Path, curriculum: Curriculum) -> None:
    """Checks the recipe and shards that the run continues with; nothing is written yet, see :func:`keep`.

    Args:
        opened: the data of the current recipe.
        folder: the run's folder.
        curriculum: the run's stages.

    Raises:
        UserError: if the shards or their tokenizer do not match the recipe or differ from those read before,
            or a domain is exhausted too early.
    """
    opened.require_match()
    require_epoch_budget(opened.recipe, curriculum, opened.plan(curriculum))
    require_same_data(folder, data_digests(opened))


def keep(recipe: Recipe, folder: Path, digests: dict[str, str], progress: Progress) -> None:
    """Records in the run's folder what it continues with, once nothing can refuse it any more.

    The recipe comes last: whatever ends this in between, the next start finds the former recipe or this one.

    Args:
        recipe: the recipe that the run continues with.
        folder: the run's folder.
        digests: of the shards, see :func:`data_digests`.
        progress: of the checkpoint.
    """
    keep_data(folder, digests)
    if progress.batch:
        keys = differences(keys_of(load_recipe(folder / RECIPE_FILE)), keys_of(recipe))
        if keys:
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            place = progress.batch, progress.tokens
            add_change(folder, Change(*place, now, recipe.name, "", tuple(keys)))
    keep_recipe(recipe, folder)


def data_digests(opened: OpenedData) -> dict[str, str]:
    """Returns the digests of the shards that a run reads, by domain and split, and of their tokenizer."""
    return {TOKENIZER: opened.manifest.tokenizer.fingerprint} | {
        f"{domain}/{split}": record.index_sha256
        for domain in opened.validated_domains
        for split, record in opened.manifest.domains[domain].splits.items()
    }


def drop_after(folder: Path, batch: int) -> None:
    """Drops later batches from the records; training does so too, but there may be nothing left to train."""
    for name in RECORDS:
        if (folder / name).exists():
            log = StepLog(folder / name)
            log.drop_after(batch)
            log.close()


def load_weights(
    recipe: Recipe, resumed: Resumed, model: LanguageModel, optimizer: Optimizer, topology: Topology
) -> None:
    """Loads the run's checkpoint or, if it has none, the weights of `start.weights`."""
    if resumed.memory is not None:
        copy = resumed.memory
        copy.load(model, optimizer, topology, is_fork=recipe.start.run is not None)
        senders = [f"rank {rank}'s from {host}" for rank, host in copy.sent.items()]
        others = f" ({', '.join(senders)})" if senders else ""
        line = f"resumed from the copy in memory of batch {copy.progress.batch}{others}"
        log_on_rank_0(topology, f"{line}, {copy.progress.tokens:,} tokens")
        return
    if resumed.checkpoint is not None:
        checkpoint = resumed.checkpoint
        if recipe.start.run is not None:
            run_on_rank_0(topology, lambda: require_moments(checkpoint, model))
        load_checkpoint(resumed.checkpoint, model, optimizer, topology, replicas_of(model))
        if recipe.start.run is None:  # a fork may change them
            run_on_rank_0(topology, lambda: require_same_groups(checkpoint, model, optimizer))
        log_on_rank_0(topology, f"resumed from {resumed.checkpoint}, {resumed.progress.tokens:,} tokens")
        return
    try:
        start = run_on_rank_0(topology, lambda: find_start(recipe))
        if start is not None:
            start_from(start, recipe, model, optimizer, topology, replicas_of(model))
            log_on_rank_0(topology, f"initial weights from {start}")
    except UserError as error:
        raise UserError(
            str(error), key="start.weights", remedy="name complete weights of this model"
        ) from None


def require_same_groups(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Refuses to continue with other hyperparameters of any weight than the checkpoint was trained with.

    Raises:
        UserError: for the first difference. The recipe's keys cannot have changed, but their meaning may, in
            another version.
    """
    before = read_hyperparameters(checkpoint / STATE_FOLDER)
    found = first_difference(before, hyperparameters_of(model, optimizer.param_groups))
    if found:
        raise UserError(
            f"{checkpoint}: {found}", key="optimizer", remedy="resume with the version that wrote it"
        )


def _note_found(folder: Path, batch: int) -> None:
    """Notes the checkpoint that a run resumes from, and says if a later one has vanished."""
    saved = last_saved(folder) or 0
    if saved < batch:
        note_saved(folder, batch)
    if _is_gone(folder, batch):
        progress_log.warning(
            f"the checkpoint of batch {saved} of {folder} is gone; resuming from batch {batch}"
        )


def _is_gone(folder: Path, batch: int) -> bool:
    """Returns True if a checkpoint that was written after a batch is no longer there, sound or not."""
    saved = last_saved(folder) or 0
    later = (f"batch-{saved:08d}", f"{ASIDE}{saved:08d}")
    return saved > batch and not any((folder / CHECKPOINTS_FOLDER / name).exists() for name in later)
