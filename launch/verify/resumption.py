"""The resume check: randomly killed runs resume bit for bit; a preempted run resumes under other layouts.

Every run uses the real trainer, on the tiny recipe, in ranks that are killed with SIGKILL or preempted with
SIGTERM.
"""

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from launch.verify.cases import Layout, context_layouts, layouts, pipeline_layouts, tensor_layouts
from launch.verify.equality import differences, read_state, unequal
from launch.verify.forked_ranks import Ranks, run_ranks
from launch.verify.harness import ONE, Row, TableCheck, Workspace
from launch.verify.tiny_runs import PATIENCE_SECONDS, STEPS, await_moment, named, record, steps, tail, trainer
from train.checkpoint.files import PARTIAL, newest_whole_checkpoint
from train.checkpoint.loading import load_checkpoint
from train.layout.mesh import replicas_of
from train.recipe.schema import Precision, Recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.run_folder import CHECKPOINTS_FOLDER
from train.run import Machine, build_model
from train.step.checkpointing import PREEMPTED_STATUS

CHAIN = (
    Layout(1, 1, 1),
    Layout(1, 2, 2),
    Layout(2, 1, 2),
    Layout(1, 4, 1),
    Layout(1, 1, 4, context=2),
    Layout(2, 1, 2, tensor=2),
    Layout(1, 1, 2, pipeline=2),
)
KILLS = 20
BOUND = 1e-5
"""Largest relative difference of a loss after a change of layout, fp32."""


class ResumeCheck(TableCheck):
    """Kills, half on one rank and half on two, then a chain of layouts.

    Args:
        kills: number of kills; a quarter more are of runs with copies in memory.
    """

    name = page = "resume"
    title = "Resuming"
    text = (
        f"Runs of {STEPS} steps of the tiny recipe, fp32. After kill -9 the same command continues: losses, "
        "gradient norms, weights, optimizer and generators equal those of a run that was never killed, bit "
        "for bit; with copies, from those in the hosts' memory. A preempted run continues under another "
        "layout (replicate, shard, expert): every loaded tensor equals what was saved."
    )

    def __init__(self, kills: int = KILLS) -> None:
        super().__init__()
        self.kills = kills

    def run(self, workspace: Workspace) -> Iterator[Row]:
        """Yields a row for each layout of the kills, then one for each layout of the chain."""
        small = workspace.small
        possible = [*layouts(small), *context_layouts(small), *tensor_layouts(small)]
        possible += [layout for layout in pipeline_layouts(small) if layout.pipeline <= small.model.n_layers]
        chain = [layout for layout in CHAIN if layout in possible]
        self.total = 3 + len(chain)
        for layout in (ONE, workspace.pair):
            generator = random.Random(small.seed)
            whole = workspace.uninterrupted(layout)
            yield kill_and_resume(small, layout, whole, (self.kills + 1) // 2, generator)
        copied = replace(small, checkpoint=replace(small.checkpoint, memory_interval_batches=1))
        whole = workspace.uninterrupted(workspace.pair)
        yield kill_and_resume(copied, workspace.pair, whole, (self.kills + 3) // 4, generator)
        yield from reshard(small, chain, workspace.uninterrupted(ONE))


def kill_and_resume(small: Recipe, layout: Layout, whole: Path, kills: int, generator: random.Random) -> Row:
    """Kills runs, several times each, ``kills`` times in all, and compares every finished run."""
    spent = mid_save = runs = 0
    is_copied = small.checkpoint.memory_interval_batches is not None
    violations: list[str] = []
    while spent < kills:
        recipe = named(small, layout, f"killed-{'copied-' * is_copied}{layout.world_size}-{runs}")
        runs += 1
        folder = Path(recipe.runs_dir) / recipe.name
        while True:
            begun = time.time()
            with Ranks(layout.world_size, trainer(recipe), folder.with_suffix(".log")) as ranks:
                after = steps(folder) + generator.randint(1, 6)
                is_over = spent >= kills or not await_moment(ranks, _moment(folder, after, generator))
                if is_over:
                    codes = ranks.exit_codes(PATIENCE_SECONDS)
                    break
                ranks.kill()
            spent += 1
            partial = (folder / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL}")
            mid_save += any(part.stat().st_mtime > begun for part in partial)
        if any(codes):
            violations.append(f"{recipe.name} ended with {codes}: {tail(folder)}")
        else:
            violations += [f"{recipe.name}: {each}" for each in differences(whole, folder)]
    figures = f"{spent} kills, {mid_save} of them in a save, over {runs} runs; all equal bit for bit"
    if violations:
        figures = f"{spent} kills, {mid_save} of them in a save, over {runs} runs"
    return Row("kill -9, copies" if is_copied else "kill -9", str(layout), figures, violations)


def reshard(small: Recipe, chain: list[Layout], whole: Path) -> Iterator[Row]:
    """Preempts one run and resumes it under the next layout of the chain, until it completes."""
    folder = Path(small.runs_dir) / "chain"
    for place, layout in enumerate(chain):
        recipe = named(small, layout, "chain")
        violations = [] if place == 0 else _loading_mismatches(recipe, layout, folder)
        first = steps(folder) + 1
        is_last = place == len(chain) - 1
        until = STEPS * (place + 1) // len(chain)
        with Ranks(layout.world_size, trainer(recipe), folder.with_suffix(".log")) as ranks:
            if not is_last:
                await_moment(ranks, functools.partial(_has_step, folder, until))
                # A signal to one rank must stop all.
                ranks.processes[-1].terminate()
            codes = ranks.exit_codes(PATIENCE_SECONDS)
        if set(codes) != {0 if is_last else PREEMPTED_STATUS}:
            violations.append(f"ended with {codes}: {tail(folder)}")
        errors = list(_loss_errors(whole, folder, first))
        if not errors or not all(error <= BOUND for error in errors):
            violations.append(f"losses of steps {first} on differ by {max(errors, default=float('nan')):.1e}")
        loaded = "" if place == 0 else ", loaded tensors equal" if not violations else ""
        yield Row(
            "reshard",
            str(layout),
            f"steps {first} to {steps(folder)}, losses within {max(errors, default=0):.1e}{loaded}",
            violations,
        )


def _moment(folder: Path, after: int, generator: random.Random) -> Callable[[], bool]:
    """Builds the test for a random moment after a step: any time, or while a checkpoint is being written."""
    in_save, delay = generator.random() < 0.5, generator.uniform(0.0, 0.2)
    until = [float("inf")]

    def has_come() -> bool:
        if steps(folder) >= after:
            if in_save:
                return any((folder / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL}"))
            until[0] = min(until[0], time.monotonic() + delay)
        return time.monotonic() >= until[0]

    return has_come


def _has_step(folder: Path, step: int) -> bool:
    return steps(folder) >= step


def _loss_errors(whole: Path, folder: Path, first: int) -> Iterator[float]:
    expected = record(whole)
    for step, row in record(folder).items():
        if step >= first:
            yield abs(row[metrics.LOSS] - expected[step][metrics.LOSS]) / abs(expected[step][metrics.LOSS])


def _loading_mismatches(recipe: Recipe, layout: Layout, folder: Path) -> list[str]:
    """The tensors that differ from the checkpoint on any rank of a layout, after loading it."""
    checkpoint, _ = newest_whole_checkpoint(folder / CHECKPOINTS_FOLDER)
    assert checkpoint is not None
    expected = read_state(checkpoint)

    def work(topology: Topology) -> tuple[list[str], set[str]]:
        model, optimizer = build_model(recipe, Machine(topology, "cpu", Precision.fp32), is_resumed=True)
        load_checkpoint(checkpoint, model, optimizer, topology, replicas_of(model))
        model_state, optimizer_state = get_state_dict(model, optimizer)
        held = dict(_flatten({"model": model_state, "optimizer": optimizer_state}, ""))
        of_stage = expected
        if layout.pipeline > 1:
            of_stage = {name: tensor for name, tensor in expected.items() if name in held}
        return list(unequal(of_stage, held)), set(held)

    log = folder.with_suffix(".log")
    found = run_ranks(layout.world_size, work, output=log)
    missing = expected.keys() - set[str]().union(*(names for _, names in found))
    return [each for mismatches, _ in found for each in mismatches] + sorted(missing)[:1]


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _flatten(item, f"{prefix}{name}.")
    elif isinstance(tree, Tensor):
        yield prefix[:-1], (tree.full_tensor() if isinstance(tree, DTensor) else tree).detach()
