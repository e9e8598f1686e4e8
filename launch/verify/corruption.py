"""The corruption check: bits flipped on one rank must be found within the interval, and nothing else.

The tiny recipe trains on four forked ranks, each by itself or two and two sharing out experts, with a step
computed again every :data:`INTERVAL` batches. Persistent faults must end the run by then, with the rank among
the suspects; a transient one must be outvoted; healthy runs must raise nothing and end with the same weights,
optimizer and random-number states as without rechecks, to the bit.
"""

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback
from torch import nn
from torch.utils.data import DataLoader

from launch.verify.bit_flips import (
    Beginning,
    BitFlip,
    flip_activation,
    flip_gathered_weight,
    flip_gradient,
    flip_received,
)
from launch.verify.case_inputs import make_batches
from launch.verify.case_run import RankBatches, import_for_ranks
from launch.verify.cases import INPUTS, SEQUENCES, Layout, layouts
from launch.verify.forked_ranks import run_ranks
from launch.verify.harness import Row, TableCheck, Workspace
from train.checkpoint.files import Progress
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Precision, Recipe
from train.recipe.tiny import tiny_recipe
from train.recipe.topology import Topology
from train.run import Machine, build_model
from train.step.digests import state_digest
from train.step.microbatch import Batch
from train.step.recheck import Corruption, CorruptionError, Recheck
from train.step.step import TrainingStep
from train.trainer import build_trainer

INTERVAL = 3
"""Batches between rechecks."""
STEPS = 2 * INTERVAL
FLIPS = 20
TIMEOUT_SECONDS = 1800.0
PLACES = ("weight", "gradient", "activation", "collective")


@dataclass(frozen=True)
class Trial:
    """A run, and the fault on one of its ranks."""

    place: str
    """One of :data:`PLACES`, or "weight at rest"; empty: healthy."""
    seed: int
    layout: Layout
    rank: int = 0
    begins: int = 1
    """The batch, from 1, of its first wrong bit."""
    is_stuck: bool = False
    most: int | None = None
    """Wrong uses; None: all."""

    def is_persistently(self, place: str) -> bool:
        """Returns whether this is a persistent fault of a place."""
        return self.place == place and self.most is None


@dataclass
class CorruptedRun:
    """The course of a run, the same on every rank."""

    found: list[Corruption] = field(default_factory=list)
    has_ended: bool = False
    """True: by a :class:`CorruptionError`."""
    runs: int = 0
    """Further runs of steps."""
    state: int = 0
    """Digest of rank 0's state at the end."""


class CorruptionCheck(TableCheck):
    """Runs with flipped bits, and as many healthy ones.

    Args:
        flips: persistent faults.
        healthy: runs without a fault.
        seed: of the draw.
    """

    name = page = "corruption"
    title = "Silent corruption in"
    text = (
        "Bits flipped on one rank of the tiny recipe, in a weight, a gradient, an activation or what a "
        "collective received. A step computed again must find persistent ones within the interval."
    )
    steps = STEPS

    def __init__(self, flips: int = FLIPS, healthy: int = FLIPS, seed: int = 0) -> None:
        super().__init__()
        self.flips, self.healthy, self.seed = flips, healthy, seed

    def run(self, workspace: Workspace) -> Iterator[Row]:
        """Yields a row for each place, one for transient faults and one for healthy runs."""
        possible = layouts(workspace.recipe, (4,))
        meshes = [each for each in (Layout(1, 4, 1), Layout(1, 2, 2)) if each in possible]
        trials = draw(self.flips, self.healthy, meshes, self.seed)
        pairs = list[tuple[Trial, CorruptedRun]]()
        for mesh in meshes:
            own = [trial for trial in trials if trial.layout == mesh]
            pairs += zip(own, train(workspace.recipe, mesh, own), strict=True)
        self.layout = ", ".join(map(str, meshes))
        for place in dict.fromkeys(trial.place for trial in trials if trial.place and trial.most is None):
            yield self._persistent(place, [each for each in pairs if each[0].is_persistently(place)])
        yield self._transient([each for each in pairs if each[0].place and each[0].most is not None])
        yield self._healthy([each for each in pairs if not each[0].place])

    def _persistent(self, place: str, pairs: list[tuple[Trial, CorruptedRun]]) -> Row:
        """A row for faults of one place: found by the next recheck, and the rank among the suspects."""
        row, latest, suspects = Row(f"{place} x {len(pairs)}", self.layout, ""), 0, list[int]()
        for trial, outcome in pairs:
            found = next((each for each in outcome.found if each.is_persistent), None)
            what = f"{trial.layout}: rank {trial.rank} from batch {trial.begins}"
            if found is None or not outcome.has_ended:
                row.violations.append(f"{what}: not found ({len(outcome.found)} transient)")
                continue
            took = found.batch + 1 - trial.begins
            latest = max(latest, took)
            suspects.append(len(found.ranks))
            if took > INTERVAL:
                row.violations.append(f"{what}: found {took} batches later")
            if trial.rank not in found.ranks:
                row.violations.append(f"{what}: named {found.ranks}: {found.line}")
        counts = ", ".join(f"{suspects.count(each)} as one of {each}" for each in sorted(set(suspects)))
        row.figures = f"{len(suspects)} found, at most {latest} batches later; rank named: {counts}"
        return row

    def _transient(self, pairs: list[tuple[Trial, CorruptedRun]]) -> Row:
        """A row for bits that flipped once, in a step that is computed again."""
        row = Row(f"transient x {len(pairs)}", self.layout, "outvoted by a third run; training continued")
        for trial, outcome in pairs:
            found = [(each.is_persistent, trial.rank in each.ranks) for each in outcome.found]
            if outcome.has_ended or found != [(False, True)]:
                lines = [each.line for each in outcome.found]
                row.violations.append(f"{trial.place} of rank {trial.rank}: {lines or 'not found'}")
        return row

    def _healthy(self, pairs: list[tuple[Trial, CorruptedRun]]) -> Row:
        """A row for healthy runs: no alarm, and the state of a run without rechecks."""
        runs = sum(outcome.runs for _, outcome in pairs)
        cost = f"{runs} further runs of steps in {STEPS * len(pairs)} steps"
        figures = f"equal to runs without rechecks bit for bit; {cost}"
        row = Row(f"healthy x {len(pairs)}", self.layout, figures)
        for trial, outcome in pairs:
            if outcome.found or outcome.has_ended:
                row.violations.append(f"seed {trial.seed}: {outcome.found[0].line}")
            elif not outcome.state:
                row.violations.append(f"seed {trial.seed}: another state than without rechecks")
        return row


def draw(flips: int, healthy: int, meshes: Sequence[Layout], seed: int) -> list[Trial]:
    """Draws persistent faults, layouts and places in turn, then transient ones and healthy runs."""
    chance, trials = random.Random(seed), []

    def new_seed() -> int:
        return chance.randrange(1 << 30)

    for number in range(flips):
        place, turn = PLACES[number % len(PLACES)], number // len(PLACES)
        # A link has no place of its own in a buffer; what one receives wrongly differs each time.
        is_stuck = place != "collective" and turn // len(meshes) % 2 == 0
        if place == "weight" and not is_stuck:
            place = "weight at rest"
        layout, rank, begins = meshes[turn % len(meshes)], chance.randrange(4), chance.randint(1, INTERVAL)
        trials.append(Trial(place, new_seed(), layout, rank, begins, is_stuck))
    for place in ("gradient", "activation"):
        trials.append(Trial(place, new_seed(), meshes[0], chance.randrange(4), INTERVAL, most=1))
    return trials + [Trial("", new_seed(), meshes[number % len(meshes)]) for number in range(healthy)]


def train(recipe: Recipe, layout: Layout, trials: Sequence[Trial]) -> list[CorruptedRun]:
    """Trains each trial's run, one after the other on the same forked ranks.

    Of healthy ones it trains a second one without rechecks; where their states differ, 0 stands for it.

    Raises:
        RankError: if a rank fails otherwise than by a finding.
    """
    import_for_ranks()
    small = replace(
        tiny_recipe(recipe, steps=STEPS, global_batch_sequences=SEQUENCES),
        guard=replace(recipe.guard, recheck_interval_batches=INTERVAL),
    )
    parallelism = replace(small.parallelism, replicate=layout.replicate, expert=layout.expert)
    training = replace(small.training, precision=Precision.fp32)
    small = replace(small, parallelism=parallelism, training=training)

    def work(topology: Topology) -> list[CorruptedRun]:
        outcomes = []
        for trial in trials:
            outcome = _train(small, topology, trial, is_rechecked=True)
            if not trial.place and outcome.state != _train(small, topology, trial, is_rechecked=False).state:
                outcome.state = 0
            outcomes.append(outcome)
        return outcomes

    return run_ranks(layout.world_size, work, TIMEOUT_SECONDS, Path(os.devnull))[0]


def _train(recipe: Recipe, topology: Topology, trial: Trial, *, is_rechecked: bool) -> CorruptedRun:
    """Trains one run on this rank."""
    outcome, curriculum = CorruptedRun(), plan_stages(recipe)
    model, optimizer = build_model(recipe, Machine(topology, "cpu", Precision.fp32))
    recheck = Recheck(recipe, model, topology, report=outcome.found.append) if is_rechecked else None
    step = TrainingStep(recipe, model, topology, curriculum, recheck=recheck)
    callbacks: list[Callback] = [step]
    fault: AbstractContextManager[Any] = contextlib.nullcontext()
    if trial.place and topology.rank == trial.rank:
        flip = BitFlip(trial.seed, trial.is_stuck, stays=trial.place == "weight", most=trial.most)
        fault = _inject(trial, flip, model.decoder, callbacks)
    plain, batches = INPUTS[0], list[Batch]()
    while len(batches) < STEPS:
        batches += make_batches(recipe, plain, trial.seed + len(batches))
    share = SEQUENCES // topology.world_size
    mine = slice(topology.rank * share, (topology.rank + 1) * share)
    own = [{key: value[mine] for key, value in batch.items()} for batch in batches[:STEPS]]
    loader = DataLoader(RankBatches(own), batch_size=None)
    progress = Progress(0, 0, 0, 0.0)
    trainer = build_trainer(recipe, model, optimizer, loader, {}, callbacks, [], progress, curriculum)
    try:
        with fault:
            trainer.fit()
    except CorruptionError:
        outcome.has_ended = True
    trainer.close()
    outcome.runs = recheck.runs if recheck is not None else 0
    outcome.state = int(state_digest(model, optimizer)) ^ int(torch.random.get_rng_state().long().sum())
    return outcome


def _inject(
    trial: Trial, flip: BitFlip, decoder: nn.Module, callbacks: list[Callback]
) -> AbstractContextManager[Any]:
    """Makes this rank faulty in the context that is returned."""
    callbacks.append(Beginning(flip, trial.begins, at_rest=trial.place == "weight at rest"))
    if trial.place == "collective":
        return flip_received(flip, exchanges=trial.layout.expert > 1)
    hooks = {"weight": flip_gathered_weight, "gradient": flip_gradient, "activation": flip_activation}
    if trial.place in hooks:
        hooks[trial.place](decoder, flip)
    return contextlib.nullcontext()
