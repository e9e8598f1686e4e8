"""Passes over the batches that a run leaves out."""

import sys

from composer.core import Callback, State
from composer.loggers import Logger

from train.recipe.curriculum import Curriculum


class PassOver(Callback):
    """Moves the run's clock over what the loader has passed over; before any callback that reads the clock.

    Batches, samples and tokens count what is left out, so that positions, phases and the learning rate of
    what follows are those of a run that has trained it.

    Args:
        curriculum: the run's stages, and what is left out.
        is_main: whether this rank says so.
    """

    def __init__(self, curriculum: Curriculum, is_main: bool) -> None:
        self.curriculum, self.is_main = curriculum, is_main

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch is there; it may be a later one than the last step's neighbour."""
        stamp, curriculum = state.timestamp, self.curriculum
        batch = stamp.batch.value
        after = curriculum.trained_from(batch)
        if after == batch:
            return
        samples = curriculum.samples_before(after)
        tokens = samples * curriculum.sample_tokens
        state.timestamp = stamp.copy(
            batch=after,
            batch_in_epoch=after,
            sample=samples,
            sample_in_epoch=samples,
            token=tokens,
            token_in_epoch=tokens,
        )
        if self.is_main:
            print(
                f"batches {batch + 1} to {after} (positions {curriculum.samples_before(batch)} to "
                f"{samples - 1}) are left out by declaration",
                file=sys.stderr,
                flush=True,
            )
