"""What happens between the last backward pass of a batch and the optimizer's step."""

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from train.layout.optim import clip_gradients
from train.model.router import update_bias
from train.recipe.schema import Balance, Moe
from train.record.expert_load import measure_load
from train.record.metrics import GRADIENT_NORM
from train.step.alarms import Alarms
from train.step.guard import RouterLoad
from train.step.language_model import LanguageModel


class BeforeUpdate(Callback):
    """Adds up the experts' tokens over ranks, clips gradients, and applies the update if the guard lets it.

    An update is left out by removing the gradients: no optimizer moves or decays a weight without one.

    Args:
        moe: of the recipe; None for a dense model.
        clip_norm: largest norm; None: gradients are not clipped.
        alarms: judge each step, on every rank alike; None: every update is applied.
        sample_tokens: length of a position's sample.
    """

    def __init__(
        self, moe: Moe | None, clip_norm: float | None, alarms: Alarms | None, sample_tokens: int
    ) -> None:
        self.moe, self.clip_norm, self.alarms = moe, clip_norm, alarms
        self.sample_tokens = sample_tokens
        self._losses: list[Tensor] = []
        self._positions = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops alarms of batches that will be trained again."""
        if self.alarms is not None:
            self.alarms.drop_after(state.timestamp.batch.value)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Starts the books of a batch."""
        _model(state).expert_tokens_LE = None
        self._losses = []
        self._positions = state.batch["input_ids"].numel() // self.sample_tokens

    def after_loss(self, state: State, logger: Logger) -> None:
        """Keeps a microbatch's loss."""
        if self.alarms is not None:
            assert isinstance(state.loss, dict)
            self._losses.append(state.loss["language"].detach())

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Closes the books of a batch, clips, and leaves the update out where the guard says so."""
        model = _model(state)
        counts_LE = None
        if self.moe is not None and model.expert_tokens_LE is not None:
            counts_LE = model.expert_tokens_LE
            if dist.is_initialized():
                dist.all_reduce(counts_LE)
            model.last_counts_LE = counts_LE
        with torch.no_grad():
            norm = clip_gradients(model.parameters(), self.clip_norm).item()
        logger.log_metrics({GRADIENT_NORM: norm})
        if not self._is_applied(state, norm, counts_LE):
            model.zero_grad(set_to_none=True)
        elif self.moe is not None and counts_LE is not None and self.moe.balance is Balance.bias:
            update_bias(model.decoder, counts_LE, self.moe.bias_update_rate)

    def close(self, state: State, logger: Logger) -> None:
        """Closes the file."""
        if self.alarms is not None:
            self.alarms.close()

    def _is_applied(self, state: State, norm: float, counts_LE: Tensor | None) -> bool:
        """Whether the guard lets the update through; raises where it ends the run."""
        if self.alarms is None:
            return True
        loss, ranks = torch.stack(self._losses).double().mean(), 1
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(loss)
            loss /= ranks
        batch, first = state.timestamp.batch.value, state.timestamp.sample.value
        positions = self._positions * ranks
        return self.alarms.is_applied(batch, first, positions, loss.item(), norm, _load(counts_LE))


def _load(counts_LE: Tensor | None) -> RouterLoad | None:
    """How the worst layer spread the batch, from tokens per expert."""
    if counts_LE is None:
        return None
    loads, experts = measure_load(counts_LE), counts_LE.shape[1]
    return RouterLoad(
        entropy=min(load.entropy for load in loads),
        dead_share=max(load.dead for load in loads) / experts,
        busiest_over_mean=max(load.busiest for load in loads) * experts,
    )


def _model(state: State) -> LanguageModel:
    assert isinstance(state.model, LanguageModel)
    return state.model
