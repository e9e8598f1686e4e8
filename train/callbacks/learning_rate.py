"""Sets the learning rate of every step from the tokens seen, and records it.

Composer steps its schedulers before it moves the clock on, so that they lag by a batch; and their state
is one more thing that a resumed run could get wrong. A function of the step has neither fault.
"""

from composer.core import Callback, State
from composer.loggers import Logger

from train import sizing
from train.metrics import LEARNING_RATE
from train.optim import learning_rate_share
from train.schema import Recipe


class LearningRate(Callback):
    """Sets each parameter group's rate before the batch is trained on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.batch_tokens = sizing.tokens_per_batch(recipe)
        self.duration_tokens = sizing.trained_tokens(recipe)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Sets and logs the rate of the batch, which is the schedule's at the batch's end."""
        seen = (state.timestamp.batch.value + 1) * self.batch_tokens
        share = learning_rate_share(seen, self.duration_tokens, self.recipe.schedule)
        rate = self.recipe.optimizer.learning_rate * share
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
        logger.log_metrics({LEARNING_RATE: rate})
