"""Rollback: decides which positions a run excludes after an alarm, and records them for later starts.

The run itself ends, as it does for a replay. When it resumes, it reads the decision from ``skips.json``,
refuses checkpoints that were trained on those positions, and the curriculum skips them. So the decision is
made once, from the state of the run at the alarm, and every later start follows it.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.audit.lookup import documents_at
from data.opened import OpenedData
from train.checkpoint.files import CheckpointError, check_checkpoint
from train.layout.ranks import run_on_rank_0
from train.recipe.curriculum import Curriculum
from train.recipe.errors import UserError
from train.recipe.reliability import Guard
from train.recipe.topology import Topology
from train.record.run_folder import CHECKPOINTS_FOLDER, batches_of
from train.record.skips import GuardDecision, read_decisions, write_decisions

Documents = Callable[[int, int], list[dict[str, Any]]]
"""Looks up the documents at positions, given the first position and their number."""

LISTING_SECONDS = 60.0
"""Time limit for looking up an alarm's documents, since other ranks wait; ``data.audit --step`` has none."""
LISTED_AT_ONCE = 64
MOST_LIST_BYTES = 1 << 28
"""Larger lists of documents are not searched for names: the alarm then has only the documents' numbers."""


class RollbackError(RuntimeError):
    """The run is to be rolled back to before an alarm, excluding the data that led to it."""


@dataclass(frozen=True)
class Rollback:
    """Decides and records which positions a run excludes."""

    folder: Path
    """Folder of the run."""
    recipe: Guard
    curriculum: Curriculum
    topology: Topology
    wait: Callable[[], None]
    """Waits for a checkpoint that is still being written; every rank calls it."""

    def decide(
        self, batch: int, batches: int, alarms: list[str], documents: list[dict[str, Any]]
    ) -> GuardDecision | None:
        """Records the positions to exclude; every rank calls it and gets the same decision.

        Args:
            batch: the batch of the alarm, from 0.
            batches: how many batches caused the alarm, this one being the last.
            alarms: one line each.
            documents: documents of the batch; on the main rank only.

        Returns:
            The decision; None if the run has already been rolled back as often as the recipe allows.

        Raises:
            OSError: if the record can't be written.
        """
        # A save in progress may still add a checkpoint.
        self.wait()
        return run_on_rank_0(self.topology, lambda: self._decide(batch, batches, alarms, documents))

    def _decide(
        self, batch: int, batches: int, alarms: list[str], documents: list[dict[str, Any]]
    ) -> GuardDecision | None:
        before = read_decisions(self.folder)
        if len(before) >= self.recipe.most_rollbacks:
            return None
        first = max(0, batch + 1 - batches - self.recipe.rollback_before_batches)
        kept = checkpointed_batches(self.folder / CHECKPOINTS_FOLDER)
        if kept:
            # The run can't be rolled back beyond its oldest checkpoint.
            first = max(first, min(kept))
        decision = GuardDecision(
            first_position=self.curriculum.samples_before(first),
            end_position=self.curriculum.samples_before(batch + 1 + self.recipe.rollback_after_batches),
            step=batch + 1,
            alarms=alarms,
            documents=documents,
        )
        write_decisions(self.folder, [*before, decision])
        return decision


def checkpointed_batches(root: Path) -> list[int]:
    """Batches of the checkpoints with no missing or truncated file, in ascending order."""
    found = []
    for batch, folder in batches_of(root).items():
        try:
            check_checkpoint(folder, content=False)
        except CheckpointError:
            continue
        found.append(batch)
    return sorted(found)


def documents_of(opened: OpenedData, curriculum: Curriculum) -> Documents:
    """Returns a lookup of the documents at a run's positions, from its plan and its shards."""
    plan = opened.plan(curriculum)
    folders = {domain: opened.shards(domain, "train") for domain in plan.domains}

    def listed(domain: str) -> Path | None:
        file = opened.documents_file(domain)
        return file if file.is_file() and file.stat().st_size <= MOST_LIST_BYTES else None

    def documents(first: int, samples: int) -> list[dict[str, Any]]:
        end, found = time.monotonic() + LISTING_SECONDS, []
        for begin in range(0, samples, LISTED_AT_ONCE):
            count = min(LISTED_AT_ONCE, samples - begin)
            try:
                found += [
                    asdict(piece) for piece in documents_at(plan, folders, listed, first + begin, count)
                ]
            except (UserError, OSError) as error:
                # Better an alarm without its documents than none.
                return [*found, {"position": first + begin, "error": str(error)}]
            if time.monotonic() > end:
                return [*found, {"position": first + begin + count, "error": "the rest was not looked up"}]
        return found

    return documents
