"""Sets the learning rate of every step from the tokens seen, and records it.

Composer steps its schedulers before it moves the clock on, so that they lag by a batch; and their state
is one more thing that a resumed run could get wrong. A function of the step has neither fault.
"""

from composer.core import Callback, State
from composer.loggers import Logger

from train.layout.optim import learning_rate_share
from train.recipe.curriculum import Curriculum
from train.recipe.schema import Recipe
from train.record.metrics import LEARNING_RATE


class LearningRate(Callback):
    """Sets each parameter group's rate before the batch is trained on."""

    def __init__(self, recipe: Recipe, curriculum: Curriculum) -> None:
        self.recipe, self.curriculum = recipe, curriculum

    def batch_start(self, state: State, logger: Logger) -> None:
        """Sets and logs the rate of the batch: the schedule's at the batch's end times the phase's scale."""
        batch = state.timestamp.batch.value
        seen = self.curriculum.tokens_after(batch)
        share = learning_rate_share(seen, self.curriculum.tokens, self.recipe.schedule)
        scale = self.curriculum.stage_of(batch).learning_rate_scale
        rate = self.recipe.optimizer.learning_rate * share * scale
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
        logger.log_metrics({LEARNING_RATE: rate})
