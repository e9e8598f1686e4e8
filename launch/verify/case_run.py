"""Runs one case of the parity gate through the real trainer and compares it with the reference.

The reference is one unsharded process that records its values in a file. Every rank of a layout compares
its own values with that file, parameter by parameter and expert by expert, so that drift between replicas
is found too.
"""

import contextlib
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from launch.verify.bounds import LEAST_GAP
from launch.verify.case_inputs import idle_experts, make_batches, steer_router
from launch.verify.cases import Case
from launch.verify.forked_ranks import RankError, StandingRanks, run_ranks
from launch.verify.loaded_input import build_loader
from launch.verify.reference import (
    CountTogether,
    build_rounding_reference,
    reference_recipe,
    split_products,
)
from launch.verify.watching import Comparer, Deviation, ReferenceRecord, WatchedStep, Watcher, Writer
from train.checkpoint.files import Progress
from train.layout.optim import load_lion
from train.recipe import sizes
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Compile, Precision, Recipe
from train.recipe.topology import Topology
from train.run import Machine, build_model
from train.step.microbatch import Batch
from train.trainer import build_trainer

SEEDS = 50
MOST_CASES = 16
"""Cases that the same ranks run, each of which leaves the process groups of its mesh behind."""

Fault = Callable[[], contextlib.AbstractContextManager[Any]]
"""Context in which a rank's process trains incorrectly; for testing the gate itself."""


@dataclass
class CaseOutcome:
    """A case with its deviations by quantity."""

    case: Case
    deviations: dict[str, Deviation] = field(default_factory=dict)
    error: str = ""
    """Reason why the case did not complete, if it did not."""
    seconds: float = 0.0

    @property
    def has_passed(self) -> bool:
        """True if every quantity is within its bound."""
        return not self.error and not any(d.first for d in self.deviations.values())


LAZY = ("torch._dynamo", "composer.algorithms")
"""Imported by optimizers and Composer at their first use: with torch 2.15 a second of each rank's time."""


def import_for_ranks() -> None:
    """Imports what training imports lazily, once, so that not every forked rank has to in every case."""
    load_lion()
    for name in LAZY:
        importlib.import_module(name)


def make_reference(case: Case, file: Path) -> int:
    """Runs the case on one process and writes its record; returns the seed of the data.

    Skips data in which rounding could change some token's choice of experts.

    Raises:
        RankError: if the reference fails, or an input does not have its intended effect.
    """

    def work(_: Topology) -> int:
        for seed in range(SEEDS):
            record = ReferenceRecord()
            train_case(case, Topology(), seed, Writer(record))
            if record.least_gap > LEAST_GAP:
                _check_input(case, record)
                torch.save(record.__dict__, file)
                return seed
        raise AssertionError(f"in each of {SEEDS} seeds, some token's choice of experts is within rounding")

    return run_ranks(1, work, output=Path(os.devnull))[0]


def run_case(
    case: Case, seed: int, file: Path, fault: Fault = contextlib.nullcontext
) -> dict[str, Deviation]:
    """Runs the case under its layout and returns the deviations over all ranks."""

    def work(topology: Topology) -> dict[str, Deviation]:
        return compare_case(topology, case, seed, file, fault)

    return _merged(run_ranks(case.layout.world_size, work, output=Path(os.devnull)))


def compare_case(
    topology: Topology,
    case: Case,
    seed: int,
    file: Path,
    fault: Fault = contextlib.nullcontext,
    comparer_of: Callable[[ReferenceRecord, Case, Topology], Comparer] = Comparer,
) -> dict[str, Deviation]:
    """Runs this rank's part of a case and returns its deviations from the reference."""
    record = ReferenceRecord(**torch.load(file, mmap=True, weights_only=True))
    comparer = comparer_of(record, case, topology)
    with fault():
        train_case(case, topology, seed, comparer)
    return comparer.deviations


class CaseRanks:
    """Runs case after case, on ranks that stay for some cases; those of each number of ranks wait for theirs.

    Args:
        compare: runs a rank's part of a case, given what :meth:`run` is given.
    """

    def __init__(self, compare: Callable[..., dict[str, Deviation]] = compare_case) -> None:
        self._compare = compare
        self._standing: dict[int, StandingRanks[dict[str, Deviation]]] = {}
        self._done: Counter[int] = Counter()

    def __enter__(self) -> "CaseRanks":
        return self

    def __exit__(self, *_: object) -> None:
        for world in list(self._standing):
            self._end(world)

    def run(self, case: Case, *given: object) -> dict[str, Deviation]:
        """Runs a case and returns the deviations over all ranks.

        Raises:
            RankError: if a rank fails; the next case has new ranks.
        """
        world = case.layout.world_size
        # torch compiles a function only a few times in a process, then runs it uncompiled.
        if self._done[world] >= MOST_CASES or case.recipe.training.compile is not Compile.off:
            self._end(world)
        if world not in self._standing:
            self._standing[world] = StandingRanks(world, self._compare, Path(os.devnull))
        self._done[world] += 1
        try:
            return _merged(self._standing[world].do(case, *given))
        except RankError:
            self._end(world)
            raise

    def _end(self, world: int) -> None:
        if world in self._standing:
            self._standing.pop(world).close()
        self._done[world] = 0


def _merged(found: Iterable[dict[str, Deviation]]) -> dict[str, Deviation]:
    merged: dict[str, Deviation] = {}
    for deviations in found:
        for quantity, deviation in deviations.items():
            merged.setdefault(quantity, Deviation()).merge(deviation)
    return merged


def train_case(case: Case, topology: Topology, seed: int, watcher: Watcher) -> None:
    """Runs a few steps of the real trainer on this rank's share of the case's batches."""
    recipe, rows = case.recipe, list(range(case.recipe.training.global_batch_sequences))
    if isinstance(watcher, Writer):
        recipe, rows = reference_recipe(case), list(case.rows)
    splits: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(watcher, Writer) and case.precision is Precision.bf16:
        if case.layout.tensor > 1:
            splits = split_products(case.layout.tensor)
        model, optimizer = build_rounding_reference(recipe)
    else:
        model, optimizer = build_model(recipe, Machine(topology, "cpu", case.precision))
    steer_router(model.decoder, recipe, case.input)
    loader = _loader(case, recipe, rows, seed, topology)
    curriculum = plan_stages(recipe)
    step = WatchedStep(watcher, recipe, model, topology, curriculum)
    watcher.expert_tokens = step.expert_tokens
    is_split = isinstance(watcher, Writer) and case.balance_microbatches > 1
    together = [CountTogether(model, case.balance_microbatches)] if is_split else []
    trainer = build_trainer(
        recipe,
        model,
        optimizer,
        loader,
        {},
        [watcher, step, *together],
        [watcher.figures],
        Progress(0, 0, 0, 0.0),
        curriculum,
    )
    with splits:
        trainer.fit()
        trainer.close()


def _loader(case: Case, recipe: Recipe, rows: list[int], seed: int, topology: Topology) -> DataLoader[Batch]:
    """Builds the loader of this rank's share of the case's batches."""
    if case.input.loaded:
        return build_loader(recipe, seed, topology)
    share = len(rows) // sizes.readers(recipe.parallelism, topology.world_size)
    reader = sizes.reader_of(recipe.parallelism, topology.world_size, topology.rank)
    mine = rows[reader * share : (reader + 1) * share]
    whole = make_batches(recipe, case.input, seed)
    batches = [{key: value[mine] for key, value in batch.items()} for batch in whole]
    return DataLoader(RankBatches(batches), batch_size=None)


class RankBatches(IterableDataset[Batch]):
    """This rank's batches, unchanged; Composer refuses a sized dataset that is the same on all ranks."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def _check_input(case: Case, record: ReferenceRecord) -> None:
    """Checks that the input had its intended effect in the reference, and that every gradient was clipped."""
    clip = case.recipe.training.clip_norm
    assert clip is not None and all(figures["norm"] > clip for figures in record.figures), "nothing clipped"
    threshold = case.recipe.optimizer.qk_clip
    if threshold is not None:
        assert any(figures["logit"] > threshold for figures in record.figures), "no head was clipped"
    # What multi-token prediction joins has no common component, so its layer routes as it likes.
    steered = sizes.expert_layers(replace(case.recipe.model, mtp=False))
    for found_LE in record.choices:
        if found_LE is None:
            continue
        choices_LE = found_LE[:steered]
        if case.input.idle:
            idle = idle_experts(case.recipe)
            assert not choices_LE[:, len(choices_LE[0]) - idle :].any(), (
                "experts that should be idle got tokens"
            )
        if case.input.crowded:
            assert (choices_LE.max(dim=1).values == choices_LE.sum(dim=1)).all(), "no expert got every token"
