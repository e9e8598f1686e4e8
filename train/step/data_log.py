"""The data log: the data that each step was trained on, by domain, and its running totals.

``data_log.jsonl`` has a line per step::

    {"step": 7, "first": 48, "length": 512, "domains": {"code": [4, 2044, "9f0c..."], ...}}

``first`` is the position of the batch's first sequence (null, in runs of earlier versions, if its positions
are not contiguous), ``length`` the tokens per sequence. Each domain has its sequences, its tokens with a
loss, and the digest (:mod:`data.shards.digest`) of the sequences that the ranks fed to the model. ``python -m
data.audit RUN`` compares all of it with the plan and the shards. Totals are saved in every checkpoint; a run
that resumes from one drops later lines. A batch of other positions than it should have read ends the run,
before it is recorded or saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.recipe.curriculum import Curriculum
from train.record import log, metrics
from train.record.run_folder import DATA_LOG_FILE
from train.record.step_log import STEP, StepLog, read_steps
from train.step.batch_sums import BatchTotals
from train.step.domain_counts import DomainEntry, read_entries

logger = log.get_logger(__name__)

Totals = dict[str, dict[str, int]]
"""``{"code": {"samples": 10, "tokens": 5120}}``"""


class WrongDataError(RuntimeError):
    """A rank has read other sequences than its own; what they have trained is in no checkpoint."""


@dataclass(frozen=True)
class Domain:
    """A domain in the data log."""

    name: str
    samples: int
    """Samples of its training split, which make up an epoch."""


class DataLog:
    """Sums and records the data trained on; on every rank, since every rank takes part in a checkpoint.

    Args:
        run_dir: folder of the run; None on ranks that don't write.
        domains: in the order that ``domain_ids`` index.
        sample_tokens: tokens of a sample of the shards.
        totals: totals in the checkpoint that the run resumes from; empty for a new run.
        curriculum: the run's stages and excluded ranges.
        counts_targets: total the tokens with a loss too.
    """

    def __init__(
        self,
        run_dir: Path | None,
        domains: Sequence[Domain],
        sample_tokens: int,
        totals: Mapping[str, Mapping[str, int]],
        curriculum: Curriculum,
        counts_targets: bool = False,
    ) -> None:
        self.curriculum, self.counts_targets = curriculum, counts_targets
        self.log = StepLog(run_dir / DATA_LOG_FILE) if run_dir else None
        self.domains, self.sample_tokens = tuple(domains), sample_tokens
        empty = {"samples": 0, "tokens": 0, **({"targets": 0} if counts_targets else {})}
        self.totals: Totals = {domain.name: {**empty, **totals.get(domain.name, {})} for domain in domains}
        """Samples, tokens and, if they are counted, targets of each domain so far, over all ranks."""
        # Keep the totals of domains that are no longer in the mixture.
        self.totals |= {name: dict(total) for name, total in totals.items() if name not in self.totals}

    def drop_after(self, batch: int) -> None:
        """Drops lines of batches that will be trained again, and warns if earlier lines are missing."""
        if self.log is None:
            return
        self.log.drop_after(batch)
        lines = read_steps(self.log.path)
        steps = [trained + 1 for trained in self.curriculum.trained_before(batch)]
        if [line[STEP] for line in lines] != steps:
            logger.warning(
                f"{self.log.path} has {len(lines)} of the {len(steps)} steps so far; "
                "`python -m data.audit` names the missing ones"
            )

    def record(self, step: int, batch: BatchTotals) -> dict[str, float]:
        """Writes a batch's line and returns its figures by metric key; every rank calls it.

        Args:
            step: the step's number, from 1.
            batch: totals with counts by domain.

        Raises:
            WrongDataError: if the positions that the ranks have read are not the batch's.
        """
        assert batch.domain_sums_GC is not None
        entries = read_entries(batch.domain_sums_GC)
        self._require_own(step, entries, batch.sequence_tokens)
        figures: dict[str, float] = {}
        for domain, entry in zip(self.domains, entries, strict=True):
            total = self.totals[domain.name]
            tokens = entry.sequences * batch.sequence_tokens
            total["samples"] += tokens // self.sample_tokens
            total["tokens"] += tokens
            figures[metrics.of_domain(metrics.DOMAIN_TOKENS, domain.name)] = total["tokens"]
            if self.counts_targets:
                total["targets"] = total.get("targets", 0) + entry.targets
                figures[metrics.of_domain(metrics.DOMAIN_TARGETS, domain.name)] = total["targets"]
            figures[metrics.of_domain(metrics.DOMAIN_SAMPLES, domain.name)] = total["samples"]
            figures[metrics.of_domain(metrics.DOMAIN_EPOCHS, domain.name)] = total["samples"] / domain.samples
            if entry.targets:
                figures[metrics.of_domain(metrics.LOSS_DOMAIN, domain.name)] = entry.loss_sum / entry.targets
        if self.log is not None:
            self._write(step, entries, batch.sequence_tokens)
        return figures

    def close(self) -> None:
        """Closes the file."""
        if self.log is not None:
            self.log.close()

    def _require_own(self, step: int, entries: list[DomainEntry], length: int) -> None:
        """Compares the sum of the positions that the ranks have read with that of the batch's."""
        expected, stride = self.curriculum.samples_before(step - 1), length // self.sample_tokens
        wanted = self.curriculum.stage_of(step - 1).batch_sequences
        count = sum(entry.sequences for entry in entries)
        first = first_position(entries, stride)
        if (count, first) != (wanted, expected):
            read = "others"
            if first is not None and count == wanted:
                read = f"{first} to {first + count * stride - 1}"
            own = f"positions {expected} to {expected + wanted * stride - 1}"
            raise WrongDataError(f"batch {step} has {own}, but the ranks read {read}")

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
            logger.warning(f"{self.log.path} NOT written: {error}; training continues")


def first_position(entries: list[DomainEntry], stride: int) -> int | None:
    """The batch's first position, if the sum of its positions is that of a range with this stride."""
    count = sum(entry.sequences for entry in entries)
    rest = sum(entry.position_sum for entry in entries) - stride * count * (count - 1) // 2
    return rest // count if count and rest % count == 0 else None
