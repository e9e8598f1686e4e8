"""What happens between the last backward pass of a batch and the optimizer's step."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from train.callbacks.expert_load import measure_load
from train.composer_model import LanguageModel
from train.metrics import GRADIENT_NORM
from train.moe import update_bias
from train.optim import clip_gradients
from train.schema import Balance, Moe
from train.step_log import StepLog
from train.watch.guard import Action, Guard, RouterLoad, Verdict

ALARMS_FILE = "alarms.jsonl"


class BeforeUpdate(Callback):
    """Adds up the experts' tokens over ranks, clips gradients, and applies the update if the guard lets it.

    An update is left out by removing the gradients: no optimizer moves or decays a weight without one.

    Args:
        moe: of the recipe; None for a dense model.
        clip_norm: largest norm; None: gradients are not clipped.
        guard: judges each step, on every rank alike; None: every update is applied.
        run_folder: on the main rank, where ``alarms.jsonl`` is written.
    """

    def __init__(
        self,
        moe: Moe | None,
        clip_norm: float | None,
        guard: Guard | None = None,
        run_folder: Path | None = None,
    ) -> None:
        self.moe = moe
        self.clip_norm = clip_norm
        self.guard = guard
        self.log = StepLog(run_folder / ALARMS_FILE) if run_folder is not None else None
        self._losses: list[Tensor] = []
        self._sequences = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops alarms of batches that will be trained again."""
        if self.log is not None:
            self.log.drop_after(state.timestamp.batch.value)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Starts the books of a batch."""
        _model(state).expert_tokens_LE = None
        self._losses = []
        self._sequences = state.batch["input_ids"].shape[0]

    def after_loss(self, state: State, logger: Logger) -> None:
        """Keeps a microbatch's loss."""
        if self.guard is not None:
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
        if self.log is not None:
            self.log.close()

    def _is_applied(self, state: State, norm: float, counts_LE: Tensor | None) -> bool:
        """Whether the guard lets the update through; raises where it ends the run."""
        if self.guard is None:
            return True
        loss = torch.stack(self._losses).double().mean()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        verdict = self.guard.judge(loss.item(), norm, _load(counts_LE))
        if verdict.alarms:
            self._tell(state, verdict)
        if verdict.action is Action.replay:
            raise NotFiniteError(f"batch {_place(state)}: {verdict.alarms[-1]}")
        if verdict.action is Action.stop:
            raise GuardError(f"batch {_place(state)}: {'; '.join(verdict.alarms)}")
        return verdict.action is Action.apply

    def _tell(self, state: State, verdict: Verdict) -> None:
        """Prints and records an alarm with the positions that the step read; on the main rank."""
        if self.log is None:
            return
        batch = state.timestamp.batch.value + 1
        first = state.timestamp.sample.value
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        fields = {
            "alarms": verdict.alarms,
            "action": verdict.action.value,
            "first_position": first,
            "positions": self._sequences * ranks,
        }
        self.log.write(batch, fields)
        print(
            f"ALARM batch {_place(state)}: {'; '.join(verdict.alarms)}: {verdict.action.value}",
            file=sys.stderr,
            flush=True,
        )


class GuardError(RuntimeError):
    """The guard ended the run."""


class NotFiniteError(GuardError):
    """A step was not finite and is to be trained again from the newest checkpoint."""


def _place(state: State) -> str:
    """The batch that is being trained, and the first position that it reads."""
    return f"{state.timestamp.batch.value + 1} (from position {state.timestamp.sample.value})"


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
