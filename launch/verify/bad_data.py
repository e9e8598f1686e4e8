"""Planted bad documents are rolled back and left out: `python -m launch.verify.bad_data RECIPE.yaml`.

The recipe's shrunken form trains on two forked ranks, under the real supervisor, on text in which a few
documents are noise. Spikes must raise alarms that name the planted documents, and the run go
back and leave the positions out. In the end it must have the losses, the data_log, the weights, the optimizer
and the random numbers, bit for bit, of a run whose recipe leaves out the same positions from its beginning,
and the audit must list them. In a run whose guard raises alarms alone, the documents of each must be those
that the audit lists for its step.
"""

import argparse
import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

from data.audit.lookup import documents_of_step
from data.audit.proof import prove
from data.audit.run_data import RunBooks
from data.text.installed import CorpusDocument, installed_corpus
from data.write_shards import build_shards
from launch.restart.history import Policy
from launch.restart.supervisor import Supervisor
from launch.verify.fault_injection import LAYOUT, one_try
from launch.verify.resumption import differences, named, prepare, record, tail
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.reliability import Guard, OnSpike
from train.recipe.rules import validate
from train.recipe.schema import Data, DataSkip, Recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.skips import GuardDecision, read_decisions
from train.record.step_log import STEP, read_steps
from train.step.alarms import ALARMS_FILE

STEPS = 72
PLANTED = 4
MOST_BYTES = 60_000
"""Of the sound text of each domain."""
SHARD_BYTES = 1 << 13
"""Shards of 25 samples, read one after the other, so that a long document stands in neighbouring steps."""
NOISE_SAMPLES = 24
GUARD = Guard(
    on_spike=OnSpike.rollback,
    window_batches=64,
    rollback_before_batches=1,
    rollback_after_batches=6,
    most_rollbacks=8,
)


@dataclass
class RollbackOutcome:
    """What became of the run."""

    planted: list[str]
    """Names of the documents that are noise."""
    decisions: list[GuardDecision] = field(default_factory=list)
    named: list[list[str]] = field(default_factory=list)
    """The planted documents that each alarm names."""
    declared: list[str] = field(default_factory=list)
    """What the audit lists as left out."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean loss over the last eight steps of each run."""
    faults: list[str] = field(default_factory=list)


def documents(seed: int) -> Iterator[CorpusDocument]:
    """The installed corpus with documents of noise among its code."""
    generator, noise = random.Random(seed), list(planted(seed))
    for number, document in enumerate(installed_corpus(MOST_BYTES)):
        if document.domain == "code" and number % 5 == 4 and noise:
            yield noise.pop(generator.randrange(len(noise)))
        yield document
    assert not noise


def planted(seed: int) -> Iterator[CorpusDocument]:
    """Documents of random bytes' worth of rare characters, each long enough to fill a shard."""
    generator = random.Random(seed)
    for number in range(PLANTED):
        # Three bytes each, none of which a merge of the tokenizer has.
        text = "".join(chr(generator.randrange(0x4E00, 0x9FFF)) for _ in range(NOISE_SAMPLES * 64 // 3))
        yield CorpusDocument("code", f"planted/noise-{number}.txt", text + "\n")


def show(recipe: Recipe, folder: Path, seed: int = 0, steps: int = STEPS) -> RollbackOutcome:
    """Trains three runs and compares them.

    Args:
        recipe: any recipe; its shrunken form is trained.
        folder: for shards and runs, empty.
        seed: of the noise and its places.
        steps: length of each run.
    """
    importlib.import_module("llmfoundry.optim.lion")
    outcome = RollbackOutcome([document.name for document in planted(seed)])
    small = prepared(recipe, folder, steps)
    with mock.patch("data.text.mds.SHARD_BYTES", SHARD_BYTES):
        build_shards(small, documents=lambda: documents(seed))
    rolled = supervised(small, GUARD, "rolled-back", outcome)
    outcome.decisions = read_decisions(rolled)
    for decision in outcome.decisions:
        found = sorted({p["document"] for p in decision.documents if p.get("document") in outcome.planted})
        outcome.named.append(found)
    if not any(outcome.named):
        outcome.faults.append("no alarm names a planted document")
    skips = [
        DataSkip(each.first_position, each.end_position, f"decided at step {each.step}")
        for each in outcome.decisions
    ]
    declared = replace(small, data=replace(small.data, skips=skips))
    never_seen = supervised(declared, GUARD, "never-seen", outcome)
    outcome.faults += differences(never_seen, rolled, 0.0)
    alarmed = supervised(small, replace(GUARD, on_spike=OnSpike.alarm), "alarm-alone", outcome)
    for run in (rolled, never_seen, alarmed):
        proof = prove(RunBooks(run))
        outcome.faults += [f"audit of {run.name}: {fault}" for fault in proof.faults]
        losses = [row[metrics.LOSS] for _, row in sorted(record(run).items())]
        outcome.losses[run.name] = sum(losses[-8:]) / len(losses[-8:])
        if run == rolled:
            outcome.declared = proof.declared
    if len(outcome.declared) == 0 and outcome.decisions:
        outcome.faults.append("the audit lists nothing as left out")
    books = RunBooks(alarmed)
    for alarm in read_steps(alarmed / ALARMS_FILE):
        sights = documents_of_step(books, alarm[STEP])
        seen = [(sight.position, sight.document, sight.tokens) for sight in sights]
        if seen != [(each["position"], each["document"], each["tokens"]) for each in alarm["documents"]]:
            outcome.faults.append(f"alarm of step {alarm[STEP]}: its documents are not those that it read")
    return outcome


def prepared(recipe: Recipe, folder: Path, steps: int) -> Recipe:
    """The shrunken recipe, of one phase, on shards of its own, saved every fourth step."""
    small = prepare(recipe, folder)
    batch = small.training.global_batch_sequences
    return replace(
        small,
        data=replace(
            small.data,
            shards=str(folder / "shards"),
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


def supervised(small: Recipe, guard: Guard, name: str, outcome: RollbackOutcome) -> Path:
    """Runs to the end, started again where it goes back; returns the run's folder."""
    recipe = named(replace(small, guard=guard), LAYOUT, name)
    folder = Path(recipe.runs_dir) / name

    records = folder.with_suffix(".restarts")

    def attempt(_hosts: tuple[str, ...]) -> int:
        return one_try(recipe, None, 0, records, folder)

    status = Supervisor(attempt, Policy(backoff_seconds=0.0), records, say=lambda _: None).run()
    if status:
        outcome.faults.append(f"{name} ended with {status}: {tail(folder)}")
    return folder


def describe(outcome: RollbackOutcome) -> Iterator[str]:
    """The outcome as lines."""
    for decision, found in zip(outcome.decisions, outcome.named, strict=True):
        yield (
            f"step {decision.step}: {decision.alarms[-1]}; of the documents it read planted: "
            f"{', '.join(found) or 'none'}; positions {decision.first_position} to "
            f"{decision.end_position - 1} left out"
        )
    yield f"{sum(map(bool, outcome.named))} of {len(outcome.named)} alarms name a planted document"
    yield from (f"audit: skipped by declaration: {line}" for line in outcome.declared)
    yield from (f"loss over the last 8 steps, {name}: {loss:.4f}" for name, loss in outcome.losses.items())
    yield from (f"FAIL: {fault}" for fault in outcome.faults)
    if not outcome.faults:
        yield "rolled-back equals never-seen bit for bit: losses, data log, weights, optimizer, generators"


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (1: something is not as it must be)."""
    parser = argparse.ArgumentParser(prog="python -m launch.verify.bad_data", description=__doc__)
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--json", metavar="FILE", help="write what was found there too")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        validate(recipe, Topology(), options.recipe)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        outcome = show(recipe, Path(folder))
    for line in describe(outcome):
        print(line)
    print(f"{time.monotonic() - begun:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(outcome), indent=1))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
