"""The data log: what each step was trained on, by domain, and what that makes in all.

``data_log.jsonl`` has a line per step::

    {"step": 7, "first": 48, "length": 512, "domains": {"code": [4, 2044, "9f0c..."], ...}}

``first`` is the position of the batch's first sequence (null where its positions are no range), ``length``
the tokens of a sequence; each domain has its sequences, its tokens with a loss and the digest
(:mod:`data.shards.digest`) of what the ranks fed to the model. ``python -m data.audit RUN`` compares all of
it with the plan and the shards. Sums are in every checkpoint; a run that goes on from one drops later
lines.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from train.recipe.curriculum import Curriculum
from train.record import metrics
from train.record.run_folder import DATA_LOG_FILE
from train.record.step_log import STEP, StepLog, read_steps
from train.step.domain_counts import DomainCounts, DomainEntry
from train.step.language_model import LanguageModel

Totals = dict[str, dict[str, int]]
"""``{"code": {"samples": 10, "tokens": 5120}}``"""


@dataclass(frozen=True)
class Domain:
    """A domain as the data log counts it."""

    name: str
    samples: int
    """Samples of its training split: as many are an epoch."""


class DataLog(Callback):
    """Keeps the books; on every rank, since a checkpoint is every rank's.

    Args:
        run_dir: folder of the run; None on ranks that don't write.
        domains: in the order that ``domain_ids`` index.
        sample_tokens: tokens of a sample of the shards.
        totals: sums of the checkpoint that the run goes on from; empty at its beginning.
        curriculum: the run's stages, and what is left out.
    """

    def __init__(
        self,
        run_dir: Path | None,
        domains: Sequence[Domain],
        sample_tokens: int,
        totals: Mapping[str, Mapping[str, int]],
        curriculum: Curriculum,
    ) -> None:
        self.curriculum = curriculum
        self.log = StepLog(run_dir / DATA_LOG_FILE) if run_dir else None
        self.domains, self.sample_tokens = tuple(domains), sample_tokens
        empty = {"samples": 0, "tokens": 0}
        self.totals: Totals = {domain.name: {**empty, **totals.get(domain.name, {})} for domain in domains}
        """Samples and tokens of each domain so far, over all ranks."""
        # A domain that is no longer read was read nevertheless.
        self.totals |= {name: dict(total) for name, total in totals.items() if name not in self.totals}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Opens the books; drops lines of batches that will be trained again."""
        model = _model(state)
        model.domain_counts = DomainCounts(len(self.domains), next(model.parameters()).device)
        if self.log is not None:
            batch = state.timestamp.batch.value
            self.log.drop_after(batch)
            lines = read_steps(self.log.path)
            steps = [trained + 1 for trained in self.curriculum.trained_before(batch)]
            if [line[STEP] for line in lines] != steps:
                print(
                    f"{self.log.path} has {len(lines)} of the {len(steps)} steps so far; "
                    "`python -m data.audit` will name those that are missing",
                    file=sys.stderr,
                    flush=True,
                )

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Begins a batch."""
        books = _model(state).domain_counts
        assert books is not None
        books.clear()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Closes the batch's books, logs them and writes its line."""
        books = _model(state).domain_counts
        assert books is not None
        entries = books.close()
        figures: dict[str, float] = {}
        for domain, entry in zip(self.domains, entries, strict=True):
            total = self.totals[domain.name]
            tokens = entry.sequences * books.length
            total["samples"] += tokens // self.sample_tokens
            total["tokens"] += tokens
            figures[metrics.of_domain(metrics.DOMAIN_TOKENS, domain.name)] = total["tokens"]
            figures[metrics.of_domain(metrics.DOMAIN_SAMPLES, domain.name)] = total["samples"]
            figures[metrics.of_domain(metrics.DOMAIN_EPOCHS, domain.name)] = total["samples"] / domain.samples
            if entry.targets:
                figures[metrics.of_domain(metrics.LOSS_DOMAIN, domain.name)] = entry.loss_sum / entry.targets
        logger.log_metrics(figures)
        if self.log is not None:
            self._write(state.timestamp.batch.value, entries, books.length)

    def close(self, state: State, logger: Logger) -> None:
        """Closes the file."""
        if self.log is not None:
            self.log.close()

    def _write(self, step: int, entries: list[DomainEntry], length: int) -> None:
        assert self.log is not None
        line = {
            "first": first_position(entries, length // self.sample_tokens),
            "length": length,
            "domains": {
                domain.name: [entry.sequences, entry.targets, f"{entry.digest:016x}"]
                for domain, entry in zip(self.domains, entries, strict=True)
                if entry.sequences
            },
        }
        try:
            self.log.write(step, line)
        except OSError as error:
            print(f"{self.log.path} NOT written: {error}; training goes on", file=sys.stderr, flush=True)


def first_position(entries: list[DomainEntry], stride: int) -> int | None:
    """The first of the batch's positions, if they are every ``stride``-th of a range by their sum."""
    count = sum(entry.sequences for entry in entries)
    rest = sum(entry.position_sum for entry in entries) - stride * count * (count - 1) // 2
    return rest // count if count and rest % count == 0 else None


def _model(state: State) -> LanguageModel:
    assert isinstance(state.model, LanguageModel)
    return state.model
