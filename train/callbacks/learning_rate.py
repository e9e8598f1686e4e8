"""Records the learning rate that a step is made with."""

from composer.core import Callback, State
from composer.loggers import Logger

from train.metrics import LEARNING_RATE


class LearningRate(Callback):
    """Logs the first parameter group's rate; read before the step, since the schedule moves on after it."""

    def batch_start(self, state: State, logger: Logger) -> None:
        """Logs the rate."""
        logger.log_metrics({LEARNING_RATE: float(state.optimizers[0].param_groups[0]["lr"])})
