"""The resume certificate: runs killed at random go on exactly; runs go on under every other layout.

Every run here is the real trainer's, on the recipe's shrunken form, in ranks that are killed with SIGKILL or
preempted with SIGTERM.
"""

import functools
import importlib
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from launch.verify.cases import SEQUENCES, Layout, layouts
from launch.verify.forked_ranks import Ranks, run_ranks
from launch.verify.parity_report import write_certificate
from train.checkpoint.files import PARTIAL, STATE_FOLDER, load_checkpoint, newest_whole_checkpoint
from train.recipe.schema import BalanceScope, Checkpoint, OnExisting, Parallelism, Precision, Recipe
from train.recipe.tiny import tiny_recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.log import quiet_libraries
from train.record.run_folder import CHECKPOINTS_FOLDER, DATA_LOG_FILE, METRICS_FILE
from train.record.step_log import read_steps
from train.run import Machine, build_model, run
from train.step.checkpointing import PREEMPTED_STATUS

STEPS = 20
CHAIN = (Layout(1, 1, 1), Layout(1, 2, 2), Layout(2, 1, 2), Layout(1, 4, 1), Layout(1, 1, 4))
BOUND = 1e-5
"""Largest relative difference of a loss after a change of layout, fp32."""
PATIENCE_SECONDS = 240.0
COMPARED = (metrics.LOSS, metrics.LOSS_BALANCE, metrics.GRADIENT_NORM)


@dataclass
class CertificateRow:
    """One line of the certificate."""

    what: str
    layout: str
    figures: str
    """What was measured."""
    faults: list[str] = field(default_factory=list)
    """What is not as it must be."""

    @property
    def has_passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def certify(recipe: Recipe, json_file: str | None, html_file: str | None, kills: int) -> int:
    """Runs everything, prints and writes the certificate; returns the exit status."""
    begun = time.monotonic()
    importlib.import_module("llmfoundry.optim.lion")
    quiet_libraries()
    rows: list[CertificateRow] = []
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        small = prepare(recipe, Path(folder))
        for row in _rows(small, kills):
            verdict = "pass" if row.has_passed else "FAIL"
            print(f"{row.what:<9} {row.layout:<9} {verdict}  {row.figures}", flush=True)
            rows.append(row)
    failed = [f"{row.what} {row.layout}: {fault}" for row in rows for fault in row.faults]
    file = Path(html_file or f"resume-{recipe.name}.html")
    summary = {"recipe": recipe.name, "steps": STEPS, "seconds": round(time.monotonic() - begun)}
    write_certificate(file, summary, [(r.what, r.layout, r.figures, r.faults) for r in rows])
    if json_file:
        told = {**summary, "passed": not failed, "rows": [row.__dict__ for row in rows]}
        Path(json_file).write_text(json.dumps(told, indent=1))
    print(
        f"{sum(row.has_passed for row in rows)} of {len(rows)} rows passed in {summary['seconds']} s; {file}"
    )
    for line in failed:
        print(f"FAIL: {line}")
    return 1 if failed else 0


def prepare(recipe: Recipe, folder: Path) -> Recipe:
    """The shrunken recipe, saved after every second batch below ``folder``, in fp32."""
    small = tiny_recipe(recipe, steps=STEPS, global_batch_sequences=SEQUENCES)
    model = small.model
    if model.moe is not None and model.moe.balance_scope in (BalanceScope.rank, BalanceScope.expert_group):
        # These depend on the layout by definition.
        model = replace(model, moe=replace(model.moe, balance_scope=BalanceScope.global_batch))
    return replace(
        small,
        model=model,
        runs_dir=str(folder),
        on_existing=OnExisting.resume,
        checkpoint=Checkpoint(interval_batches=2, keep_last=2),
        tracking=replace(small.tracking, mlflow=False),
        training=replace(small.training, precision=Precision.fp32),
        evaluation=replace(small.evaluation, interval_batches=None),
    )


def _rows(small: Recipe, kills: int) -> Iterator[CertificateRow]:
    possible = {str(layout) for layout in layouts(small)}
    chain = [layout for layout in CHAIN if str(layout) in possible]
    pair = next(layout for layout in (Layout(1, 1, 2), Layout(1, 2, 1)) if str(layout) in possible)
    whole = {}
    for layout in (Layout(1, 1, 1), pair):
        whole[layout] = uninterrupted(small, layout)
        generator = random.Random(small.seed)
        yield kill_and_resume(small, layout, whole[layout], (kills + 1) // 2, generator)
    yield from reshard(small, chain, whole[Layout(1, 1, 1)])


def kill_and_resume(
    small: Recipe, layout: Layout, whole: Path, kills: int, generator: random.Random
) -> CertificateRow:
    """Kills runs until ``kills`` are spent, several times each, and compares every finished run."""
    spent = mid_save = runs = 0
    faults: list[str] = []
    while spent < kills:
        recipe = named(small, layout, f"killed-{layout.world_size}-{runs}")
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
            cut_off = (folder / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL}")
            mid_save += any(part.stat().st_mtime > begun for part in cut_off)
        if any(codes):
            faults.append(f"{recipe.name} ended with {codes}: {tail(folder)}")
        else:
            faults += [f"{recipe.name}: {fault}" for fault in differences(whole, folder, 0.0)]
    figures = f"{spent} kills, {mid_save} of them in a save, over {runs} runs; all equal bit for bit"
    if faults:
        figures = f"{spent} kills, {mid_save} of them in a save, over {runs} runs"
    return CertificateRow("kill -9", str(layout), figures, faults)


def reshard(small: Recipe, chain: list[Layout], whole: Path) -> Iterator[CertificateRow]:
    """One run that is preempted and goes on under the next layout of the chain, until its end."""
    folder = Path(small.runs_dir) / "chain"
    for place, layout in enumerate(chain):
        recipe = named(small, layout, "chain")
        faults = [] if place == 0 else _loading_faults(recipe, layout, folder)
        first = steps(folder) + 1
        is_last = place == len(chain) - 1
        until = STEPS * (place + 1) // len(chain)
        with Ranks(layout.world_size, trainer(recipe), folder.with_suffix(".log")) as ranks:
            if not is_last:
                await_moment(ranks, functools.partial(_has_step, folder, until))
                # One rank's signal must count for all.
                ranks.processes[-1].terminate()
            codes = ranks.exit_codes(PATIENCE_SECONDS)
        if set(codes) != {0 if is_last else PREEMPTED_STATUS}:
            faults.append(f"ended with {codes}: {tail(folder)}")
        errors = list(_loss_errors(whole, folder, first))
        if not errors or max(errors) > BOUND:
            faults.append(f"losses of steps {first} on differ by {max(errors, default=float('nan')):.1e}")
        loaded = "" if place == 0 else ", loaded tensors equal" if not faults else ""
        yield CertificateRow(
            "reshard",
            str(layout),
            f"steps {first} to {steps(folder)}, losses within {max(errors, default=0):.1e}{loaded}",
            faults,
        )


def named(small: Recipe, layout: Layout, name: str) -> Recipe:
    """The small recipe under a layout and another name."""
    return replace(
        small, name=name, parallelism=Parallelism(replicate=layout.replicate, expert=layout.expert)
    )


def trainer(recipe: Recipe) -> Callable[[Topology], None]:
    """The whole run, as the main job does it; its exit status is the rank's."""

    def work(topology: Topology) -> None:
        if status := run(recipe, topology):
            raise SystemExit(status)

    return work


def uninterrupted(small: Recipe, layout: Layout) -> Path:
    """The folder of a run that nothing disturbed."""
    recipe = named(small, layout, f"whole-{layout.world_size}")
    folder = Path(recipe.runs_dir) / recipe.name
    with Ranks(layout.world_size, trainer(recipe), folder.with_suffix(".log")) as ranks:
        codes = ranks.exit_codes(PATIENCE_SECONDS)
    assert not any(codes), f"the uninterrupted run ended with {codes}: {tail(folder)}"
    return folder


def _moment(folder: Path, after: int, generator: random.Random) -> Callable[[], bool]:
    """A random moment after some step: anywhere in a step, or while a checkpoint is being written."""
    in_save, delay = generator.random() < 0.5, generator.uniform(0.0, 0.2)
    until = [float("inf")]

    def has_come() -> bool:
        if steps(folder) >= after:
            if in_save:
                return any((folder / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL}"))
            until[0] = min(until[0], time.monotonic() + delay)
        return time.monotonic() >= until[0]

    return has_come


def await_moment(ranks: Ranks[None], has_come: Callable[[], bool]) -> bool:
    """Waits for a moment; False if the ranks ended before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ranks.are_running and time.monotonic() < deadline:
        if has_come():
            return True
        time.sleep(0.002)
    return False


def _has_step(folder: Path, step: int) -> bool:
    return steps(folder) >= step


def steps(folder: Path) -> int:
    """Batches that the run's record holds."""
    return max(record(folder), default=0)


def record(folder: Path) -> dict[int, dict[str, float]]:
    """A run's metrics by step; a last line that is being written is left out."""
    file = folder / METRICS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows if metrics.LOSS in row}


def _loss_errors(whole: Path, folder: Path, first: int) -> Iterator[float]:
    expected = record(whole)
    for step, row in record(folder).items():
        if step >= first:
            yield abs(row[metrics.LOSS] - expected[step][metrics.LOSS]) / abs(expected[step][metrics.LOSS])


def differences(whole: Path, folder: Path, bound: float) -> Iterator[str]:
    """What a run that was interrupted has otherwise than one that was not."""
    expected, found = record(whole), record(folder)
    if expected.keys() != found.keys():
        yield f"has steps {sorted(found)}"
        return
    for step, row in expected.items():
        for key in COMPARED:
            if key in row and abs(row[key] - found[step][key]) > bound:
                yield f"step {step}: {key} is {found[step][key]!r}, not {row[key]!r}"
                return
    for line, other in itertools.zip_longest(
        read_steps(whole / DATA_LOG_FILE), read_steps(folder / DATA_LOG_FILE)
    ):
        if line != other:
            yield f"the data log has {other}, not {line}"
            return
    states = []
    for each in (whole, folder):
        checkpoint, _ = newest_whole_checkpoint(each / CHECKPOINTS_FOLDER)
        assert checkpoint is not None
        randoms = [file.read_text() for file in sorted(checkpoint.glob("rank-*.json"))]
        states.append((read_state(checkpoint), randoms))
    yield from _unequal(states[0][0], states[1][0])
    if states[0][1] != states[1][1]:
        yield "random-number states differ"


def _unequal(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Iterator[str]:
    if expected.keys() != found.keys():
        yield f"tensors are missing or new: {sorted(expected.keys() ^ found.keys())[:3]}"
        return
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            yield f"{name} differs"
            return


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of model and optimizer in a checkpoint, whole, by its dotted name."""
    saved = dcp.FileSystemReader(checkpoint / STATE_FOLDER).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint / STATE_FOLDER, no_dist=True)
    return state


def _loading_faults(recipe: Recipe, layout: Layout, folder: Path) -> list[str]:
    """What any rank of a layout holds otherwise than the checkpoint, after loading it."""
    checkpoint, _ = newest_whole_checkpoint(folder / CHECKPOINTS_FOLDER)
    assert checkpoint is not None
    expected = read_state(checkpoint)

    def work(topology: Topology) -> list[str]:
        model, optimizer = build_model(recipe, Machine(topology, "cpu", Precision.fp32))
        load_checkpoint(checkpoint, model, optimizer, topology)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        held = dict(_flatten({"model": model_state, "optimizer": optimizer_state}, ""))
        return list(_unequal(expected, held))

    log = folder.with_suffix(".log")
    return [fault for faults in run_ranks(layout.world_size, work, output=log) for fault in faults]


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _flatten(item, f"{prefix}{name}.")
    elif isinstance(tree, Tensor):
        yield prefix[:-1], (tree.full_tensor() if isinstance(tree, DTensor) else tree).detach()


def tail(folder: Path) -> str:
    """The last lines that a run printed."""
    log = folder.with_suffix(".log")
    return " | ".join(log.read_text().strip().splitlines()[-3:]) if log.exists() else "no output"
