"""Data in: moves the clock past excluded batches and computes the batch's learning rate.

Both depend only on the batch number, so a resumed run needs no state for them. Composer's schedulers have
state and lag by a batch, since they step before the clock does.
"""

from composer.core import State

from train.layout.optim import learning_rate_share
from train.recipe.curriculum import Curriculum
from train.recipe.schema import Recipe
from train.record import log

logger = log.get_logger(__name__)


def skip_excluded(state: State, curriculum: Curriculum, is_main: bool) -> None:
    """Moves the run's clock past excluded batches, which the loader has skipped.

    Skipped batches count towards batches, samples and tokens: positions, phases and learning rate continue as
    if they had been trained. Call it before anything reads the clock.

    Args:
        state: Composer's state, whose loader has just returned a batch.
        curriculum: the run's stages and excluded ranges.
        is_main: whether this rank prints which batches are skipped.
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
        logger.warning(
            f"batches {batch + 1} to {after} (positions {curriculum.samples_before(batch)} to "
            f"{samples - 1}) are excluded and skipped"
        )


def learning_rate(recipe: Recipe, curriculum: Curriculum, batch: int) -> float:
    """Learning rate of a batch (counted from 0): the schedule at its end times its phase's scale."""
    share = learning_rate_share(curriculum.tokens_after(batch), curriculum.tokens, recipe.schedule)
    return recipe.optimizer.learning_rate * share * curriculum.stage_of(batch).learning_rate_scale
