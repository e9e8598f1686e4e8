"""Alarms of the guard: printed, recorded with the step's documents, and fatal where the recipe says so."""

from pathlib import Path
from typing import Any

from torch import Tensor

from train.record import log
from train.record.expert_load import measure_load
from train.record.run_folder import ALARMS_FILE
from train.record.step_log import StepLog
from train.step.batch_sums import BatchTotals
from train.step.guard import Action, RouterLoad, UpdateGuard, Verdict
from train.step.rollback import Documents, Rollback, RollbackError

logger = log.get_logger(__name__)

OUTCOMES = {
    Action.apply: "update applied",
    Action.skip: "update skipped",
    Action.rollback: "rolls back",
    Action.replay: "trains it again",
    Action.stop: "ends the run",
}


class GuardError(RuntimeError):
    """The guard ended the run."""


class NotFiniteError(GuardError):
    """A step's loss or norm was not finite; it is trained again from the newest checkpoint."""


class Alarms:
    """Judges each step, identically on every rank, and raises an error if the run must end.

    Args:
        guard: judges the step.
        rollback: decides which positions to exclude, for the action ``rollback``.
        documents: looks up the documents at given positions.
        run_folder: where ``alarms.jsonl`` is written; None except on the main rank.
    """

    def __init__(
        self, guard: UpdateGuard, rollback: Rollback, documents: Documents, run_folder: Path | None
    ) -> None:
        self.guard, self.rollback, self.documents = guard, rollback, documents
        self.log = StepLog(run_folder / ALARMS_FILE) if run_folder is not None else None

    def drop_after(self, batch: int) -> None:
        """Drops alarms of batches that will be trained again."""
        if self.log is not None:
            self.log.drop_after(batch)

    def would_alarm(self, totals: BatchTotals, loss: float, norm: float) -> bool:
        """Returns whether a step would raise an alarm; its verdict is left to :meth:`is_applied`."""
        guard = UpdateGuard(self.guard.recipe, self.guard.recent, self.guard.counts)
        return bool(guard.judge(loss, norm, _router_load(totals.expert_tokens_LE)).alarms)

    def is_applied(
        self, batch: int, first: int, positions: int, totals: BatchTotals, loss: float, norm: float
    ) -> bool:
        """Returns whether to apply a step's update; every rank calls it.

        Args:
            batch: the batch's number, from 0.
            first: the batch's first position.
            positions: the batch's number of positions.
            totals: the batch's tokens per expert.
            loss: mean cross-entropy over all ranks, in nats per token.
            norm: global gradient norm before clipping.

        Raises:
            NotFiniteError: if the step is to be trained again.
            RollbackError: if the run is to be rolled back; the positions to exclude are already recorded.
            GuardError: if the run is to end.
        """
        verdict = self.guard.judge(loss, norm, _router_load(totals.expert_tokens_LE))
        documents = self._report(batch, first, positions, verdict) if verdict.alarms else []
        place = f"batch {batch + 1} (from position {first})"
        if verdict.action is Action.rollback:
            decision = self.rollback.decide(batch, verdict.batches, verdict.alarms, documents)
            if decision is None:
                most = self.guard.recipe.most_rollbacks
                raise GuardError(f"{place}: {verdict.alarms[-1]}; guard.most_rollbacks={most} are used up")
            raise RollbackError(
                f"{place}: {verdict.alarms[-1]}; positions {decision.first_position} to "
                f"{decision.end_position - 1} are excluded from now on"
            )
        if verdict.action is Action.replay:
            raise NotFiniteError(f"{place}: {verdict.alarms[-1]}")
        if verdict.action is Action.stop:
            raise GuardError(f"{place}: {'; '.join(verdict.alarms)}")
        return verdict.action is Action.apply

    def close(self) -> None:
        """Closes the file."""
        if self.log is not None:
            self.log.close()

    def _report(self, batch: int, first: int, positions: int, verdict: Verdict) -> list[dict[str, Any]]:
        """On the main rank, prints and records an alarm with the step's documents, and returns them."""
        if self.log is None:
            return []
        documents = self.documents(first, positions)
        fields = {
            "alarms": verdict.alarms,
            "action": verdict.action.value,
            "first_position": first,
            "positions": positions,
            "documents": documents,
        }
        try:
            self.log.write(batch + 1, fields)
        except OSError as error:
            logger.warning(f"{self.log.path} NOT written: {error}; training continues")
        logger.warning(f"ALARM batch {batch + 1}: {'; '.join(verdict.alarms)}; {OUTCOMES[verdict.action]}")
        return documents


def _router_load(tokens_LE: Tensor | None) -> RouterLoad | None:
    """The worst layer's router load, from a batch's tokens per expert; None for a dense model."""
    if tokens_LE is None:
        return None
    loads, experts = measure_load(tokens_LE), tokens_LE.shape[1]
    return RouterLoad(
        entropy=min(load.entropy for load in loads),
        dead_share=max(load.dead for load in loads) / experts,
        busiest_over_mean=max(load.busiest for load in loads) * experts,
    )
