"""Alarms: what the guard finds in a step is printed, recorded with its documents, and may end the run."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from train.record.expert_load import measure_load
from train.record.step_log import StepLog
from train.step.batch_sums import BatchTotals
from train.step.guard import Action, RouterLoad, UpdateGuard, Verdict
from train.step.rollback import Documents, Rollback, RollbackError, names_of

ALARMS_FILE = "alarms.jsonl"


class GuardError(RuntimeError):
    """The guard ended the run."""


class NotFiniteError(GuardError):
    """A step was not finite; it will be trained again from the newest checkpoint."""


class Alarms:
    """Judges each step, on every rank alike, and raises an error where the run must end.

    Args:
        guard: judges.
        rollback: decides which positions are excluded where the recipe says so.
        documents: looks up those at some positions.
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

    def is_applied(self, batch: int, first: int, positions: int, totals: BatchTotals, norm: float) -> bool:
        """Whether a step's update is applied; on all ranks.

        Args:
            batch: from 0.
            first: its first position.
            positions: how many it has.
            totals: its loss and its tokens per expert.
            norm: global gradient norm before clipping.

        Raises:
            NotFiniteError: if it is to be trained again.
            RollbackError: if the run is to go back; the positions to exclude are recorded by then.
            GuardError: if the run is to end.
        """
        verdict = self.guard.judge(totals.loss.item(), norm, _router_load(totals.expert_tokens_LE))
        documents = self._tell(batch, first, positions, verdict) if verdict.alarms else []
        place = f"batch {batch + 1} (from position {first})"
        if verdict.action is Action.rollback:
            decision = self.rollback.decide(batch, verdict.batches, verdict.alarms, documents)
            if decision is None:
                most = self.guard.recipe.most_rollbacks
                raise GuardError(f"{place}: {verdict.alarms[-1]}; guard.most_rollbacks={most} are spent")
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

    def _tell(self, batch: int, first: int, positions: int, verdict: Verdict) -> list[dict[str, Any]]:
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
            print(f"{self.log.path} NOT written: {error}; training goes on", file=sys.stderr, flush=True)
        print(
            f"ALARM batch {batch + 1} (from position {first}): {'; '.join(verdict.alarms)}: "
            f"{verdict.action.value}; it read {names_of(documents)}",
            file=sys.stderr,
            flush=True,
        )
        return documents


def _router_load(tokens_LE: Tensor | None) -> RouterLoad | None:
    """How the worst layer spread a batch, from tokens per expert; None for a dense model."""
    if tokens_LE is None:
        return None
    loads, experts = measure_load(tokens_LE), tokens_LE.shape[1]
    return RouterLoad(
        entropy=min(load.entropy for load in loads),
        dead_share=max(load.dead for load in loads) / experts,
        busiest_over_mean=max(load.busiest for load in loads) * experts,
    )
