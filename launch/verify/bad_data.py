"""The bad-data rollback test: the run rolls back and excludes documents of noise, as if it never saw them.

The tiny recipe trains on two forked ranks, under the real supervisor, on text in which a few documents are
noise. Spikes must raise alarms that name these documents, and the run must roll back and exclude their
positions. In the end its losses, data log, weights, optimizer and random-number states must equal, bit for
bit, those of a run whose recipe excludes the same positions from the start, and the audit must list them. In
a run whose guard only raises alarms, the documents of each alarm must be those that the audit lists for its
step.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from data.audit.lookup import documents_of_step
from data.audit.proof import prove
from data.audit.run_data import RunData
from data.text.installed import CorpusDocument, installed_corpus
from data.write_shards import build_shards
from launch.restart.history import Policy
from launch.restart.supervisor import Supervisor
from launch.verify.cases import Layout
from launch.verify.equality import differences
from launch.verify.fault_injection import one_try
from launch.verify.forked_ranks import RankError
from launch.verify.harness import Row, TableCheck, Workspace
from launch.verify.tiny_runs import named, record, tail
from train.recipe.reliability import Guard, OnSpike
from train.recipe.schema import Data, DataSkip, Recipe
from train.record import metrics
from train.record.run_folder import ALARMS_FILE
from train.record.skips import GuardDecision, read_decisions
from train.record.step_log import STEP, read_steps

STEPS = 96
NOISE_DOCUMENTS = 4
MOST_BYTES = 40_000
"""Of the normal text of each domain."""
SHARD_BYTES = 1 << 13
"""Shards of 25 samples, read one after the other, so that a long document falls into neighbouring steps."""
NOISE_SAMPLES = 24
LAST_STEPS = 8
"""Steps at the end of a run over which the reported loss is averaged."""
GUARD = Guard(
    on_spike=OnSpike.rollback,
    norm_deviations=20,  # At this size, noise is no worse than repetitive text.
    window_batches=64,
    rollback_before_batches=1,
    rollback_after_batches=6,
    most_rollbacks=16,
)


@dataclass
class RollbackOutcome:
    """Outcome of the runs."""

    noise: list[str]
    """Names of the noise documents."""
    decisions: list[GuardDecision] = field(default_factory=list)
    named: list[list[str]] = field(default_factory=list)
    """The noise documents that each alarm names."""
    declared: list[str] = field(default_factory=list)
    """Excluded ranges that the audit lists."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean loss over the last steps of each run."""


class BadDataCheck(TableCheck):
    """Three runs: one rolls back, one excludes the same ranges from the start, one only raises alarms.

    Args:
        steps: length of each run.
        seed: of the noise and its positions.
    """

    name = page = "rollback"
    title = "Bad-data rollback of"
    text = (
        "Runs of the tiny recipe on text in which a few documents are noise. The guard must raise an alarm, "
        "roll back and exclude them; the result equals, bit for bit, a run that excluded them from the start."
    )

    def __init__(self, steps: int = STEPS, seed: int = 0) -> None:
        super().__init__()
        self.steps, self.seed = steps, seed
        self.outcome = RollbackOutcome([document.name for document in noise_documents(seed)])

    def run(self, workspace: Workspace) -> Iterator[Row]:
        """Yields a row for each decision of the guard, then one for each run."""
        layout = workspace.pair
        small = prepared(workspace.small, workspace.folder / "shards-with-noise", self.steps)
        with mock.patch("data.text.mds.SHARD_BYTES", SHARD_BYTES):
            build_shards(small, documents=lambda: documents(self.seed))
        rolled = supervised(small, GUARD, "rolled-back", layout)
        self.outcome.decisions = read_decisions(rolled)
        yield from self._decisions(layout)
        yield self._rolled_back(rolled, layout)
        skips = [
            DataSkip(each.first_position, each.end_position, f"decided at step {each.step}")
            for each in self.outcome.decisions
        ]
        declared = replace(small, data=replace(small.data, skips=skips))
        never_seen = supervised(declared, GUARD, "never-seen", layout)
        yield self._never_seen(never_seen, rolled, layout)
        alarmed = supervised(small, replace(GUARD, on_spike=OnSpike.alarm), "only-alarms", layout)
        yield self._only_alarms(alarmed, layout)

    def figures(self, recipe: Recipe) -> dict[str, Any]:
        """Everything for ``--json``."""
        return super().figures(recipe) | asdict(self.outcome)

    def _decisions(self, layout: Layout) -> Iterator[Row]:
        for decision in self.outcome.decisions:
            names = {each.get("document") for each in decision.documents}
            found = [name for name in self.outcome.noise if name in names]
            self.outcome.named.append(found)
            figures = (
                f"{decision.alarms[-1]}; noise documents read: {', '.join(found) or 'none'}; "
                f"positions {decision.first_position} to {decision.end_position - 1} excluded"
            )
            yield Row(f"step {decision.step}", str(layout), figures)

    def _rolled_back(self, run: Path, layout: Layout) -> Row:
        violations: list[str] = []
        named_any = [bool(found) for found in self.outcome.named]
        if not any(named_any):
            violations.append("no alarm names a noise document")
        audit, self.outcome.declared = self._audit(run, violations)
        if not self.outcome.declared and self.outcome.decisions:
            violations.append("the audit lists no excluded range")
        figures = (
            f"{sum(named_any)} of {len(named_any)} alarms name a noise document; the audit lists "
            f"{len(self.outcome.declared)} excluded ranges; {audit}"
        )
        return Row("rolled back", str(layout), figures, violations)

    def _never_seen(self, run: Path, rolled: Path, layout: Layout) -> Row:
        violations = list(differences(run, rolled))
        equal = "equal to it bit for bit; " if not violations else ""
        audit, _ = self._audit(run, violations)
        return Row("never seen", str(layout), f"{equal}{audit}", violations)

    def _only_alarms(self, run: Path, layout: Layout) -> Row:
        violations: list[str] = []
        audit, _ = self._audit(run, violations)
        books = RunData(run)
        alarms = read_steps(run / ALARMS_FILE)
        for alarm in alarms:
            sights = documents_of_step(books, alarm[STEP])
            seen = [(sight.position, sight.document, sight.tokens) for sight in sights]
            if seen != [(each["position"], each["document"], each["tokens"]) for each in alarm["documents"]]:
                violations.append(
                    f"alarm of step {alarm[STEP]}: its documents are not those that the step read"
                )
        return Row("only alarms", str(layout), f"{len(alarms)} alarms; {audit}", violations)

    def _audit(self, run: Path, violations: list[str]) -> tuple[str, list[str]]:
        """Audits a run; adds violations, returns the final loss in words and the excluded ranges."""
        proof = prove(RunData(run))
        violations += [f"audit of {run.name}: {each}" for each in proof.faults]
        losses = [row[metrics.LOSS] for _, row in sorted(record(run).items())][-LAST_STEPS:]
        self.outcome.losses[run.name] = sum(losses) / len(losses)
        return f"loss {self.outcome.losses[run.name]:.4f} over the last {len(losses)} steps", proof.declared


def documents(seed: int) -> Iterator[CorpusDocument]:
    """The installed corpus with noise documents among its code."""
    generator, noise = random.Random(seed), list(noise_documents(seed))
    for number, document in enumerate(installed_corpus(MOST_BYTES)):
        if document.domain == "code" and number % 4 == 3 and noise:
            yield noise.pop(generator.randrange(len(noise)))
        yield document
    assert not noise


def noise_documents(seed: int) -> Iterator[CorpusDocument]:
    """Documents of random rare characters, each long enough to fill a shard."""
    generator = random.Random(seed)
    for number in range(NOISE_DOCUMENTS):
        # Three bytes per character, for which the tokenizer has no merges.
        text = "".join(chr(generator.randrange(0x4E00, 0x9FFF)) for _ in range(NOISE_SAMPLES * 64 // 3))
        yield CorpusDocument("code", f"noise/{number}.txt", text + "\n")


def prepared(small: Recipe, shards: Path, steps: int) -> Recipe:
    """The tiny recipe with one phase, its own shards, and a checkpoint every fourth step."""
    batch = small.training.global_batch_sequences
    return replace(
        small,
        data=replace(
            small.data,
            shards=str(shards),
            corpus=None,
            corpus_bytes=Data().corpus_bytes,
            domains={"code": 0.5, "prose": 0.5},
            phases=[],
            window_shards=1,
            max_epochs=8.0,
            validation_sequences=8,
        ),
        training=replace(small.training, duration_tokens=steps * batch * small.data.sequence_tokens),
        checkpoint=replace(small.checkpoint, interval_batches=4, keep_last=3),
    )


def supervised(small: Recipe, guard: Guard, name: str, layout: Layout) -> Path:
    """Completes a run, restarting it after each rollback; returns its folder.

    Raises:
        RankError: if it does not complete.
    """
    recipe = named(replace(small, guard=guard), layout, name)
    folder = Path(recipe.runs_dir) / name
    records = folder.with_suffix(".restarts")

    def attempt(_hosts: tuple[str, ...]) -> int:
        return one_try(recipe, None, 0, records, folder)

    status = Supervisor(attempt, Policy(backoff_seconds=0.0), records, say=lambda _: None).run()
    if status:
        raise RankError(f"{name} ended with {status}: {tail(folder)}")
    return folder
