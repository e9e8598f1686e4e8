"""What happens between the last backward pass of a batch and the optimizer's step."""

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger

from train.composer_model import LanguageModel
from train.metrics import GRADIENT_NORM
from train.moe import update_bias
from train.optim import clip_gradients
from train.schema import Balance, Moe


class BeforeUpdate(Callback):
    """Adds up the experts' tokens over ranks, moves the balancing bias, clips gradients."""

    def __init__(self, moe: Moe | None, clip_norm: float | None) -> None:
        self.moe = moe
        self.clip_norm = clip_norm

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Starts the books of a batch."""
        _model(state).expert_tokens_LE = None

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Closes the books of a batch, then clips."""
        model = _model(state)
        if self.moe is not None and model.expert_tokens_LE is not None:
            counts_LE = model.expert_tokens_LE
            if dist.is_initialized():
                dist.all_reduce(counts_LE)
            model.last_counts_LE = counts_LE
            if self.moe.balance is Balance.bias:
                update_bias(model.decoder, counts_LE, self.moe.bias_update_rate)
        with torch.no_grad():
            norm = clip_gradients(model.parameters(), self.clip_norm)
        logger.log_metrics({GRADIENT_NORM: norm.item()})


def _model(state: State) -> LanguageModel:
    assert isinstance(state.model, LanguageModel)
    return state.model
