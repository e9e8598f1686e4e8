"""Data in: which batch this is, once excluded ones are skipped, and what the curriculum sets for it.

All of it is a function of the batch's number, so that a resumed run has it before its first batch. Composer
steps its schedulers before it moves the clock on, so that they lag by a batch, and their state would be one
more thing to restore.
"""

import sys

from composer.core import State

from train.layout.optim import learning_rate_share
from train.recipe.curriculum import Curriculum
from train.recipe.schema import Recipe


def skip_excluded(state: State, curriculum: Curriculum, is_main: bool) -> None:
    """Moves the run's clock over excluded batches, which the loader has skipped; before anyone reads it.

    Batches, samples and tokens count what is skipped, so that positions, phases and the learning rate of
    what follows are those of a run that has trained it.

    Args:
        state: of the run, whose loader has just given a batch.
        curriculum: the run's stages, and the ranges that are excluded.
        is_main: whether this rank says so.
    """
    batch = state.timestamp.batch.value
    after = curriculum.trained_from(batch)
    if after == batch:
        return
    samples = curriculum.samples_before(after)
    tokens = samples * curriculum.sample_tokens
    state.timestamp = state.timestamp.copy(
        batch=after,
        batch_in_epoch=after,
        sample=samples,
        sample_in_epoch=samples,
        token=tokens,
        token_in_epoch=tokens,
    )
    if is_main:
        print(
            f"batches {batch + 1} to {after} (positions {curriculum.samples_before(batch)} to "
            f"{samples - 1}) are left out by declaration",
            file=sys.stderr,
            flush=True,
        )


def learning_rate(recipe: Recipe, curriculum: Curriculum, batch: int) -> float:
    """Learning rate of a batch, from 0: the schedule's at the batch's end times the scale of its phase."""
    share = learning_rate_share(curriculum.tokens_after(batch), curriculum.tokens, recipe.schedule)
    return recipe.optimizer.learning_rate * share * curriculum.stage_of(batch).learning_rate_scale
