"""A run whose long phase has context parallelism of its own trains as one layout all along does."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.audit.proof import prove
from data.audit.run_data import RunData
from launch.restart.history import Policy, read_log
from launch.restart.supervisor import Supervisor
from launch.verify.forked_ranks import RankError, Ranks
from launch.verify.tiny_runs import import_for_runs, trainer
from train.checkpoint.files import read_progress
from train.health.heartbeat import RECORDS_VARIABLE
from train.recipe.exit_status import PREEMPTED_STATUS
from train.recipe.rules import validate
from train.recipe.schema import Parallelism, Recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.run_folder import CHECKPOINTS_FOLDER, DATA_LOG_FILE, METRICS_FILE, RECIPE_FILE
from train.record.step_log import read_steps

pytestmark = pytest.mark.slow

TinyRecipe = Callable[..., Recipe]

# Batches 1 to 4 and 5 to 8, of 512 tokens each; sequences of 64 tokens, then of 128.
PHASES = (
    "data.phases=["
    "{tokens: 2048, weights: {code: 0.75, prose: 0.25}},"
    "{tokens: 2048, weights: {code: 0.2, prose: 0.8}, sequence_tokens: 128, rope_theta: 100}]",
    "training.duration_tokens=4096",
    "checkpoint.interval_batches=3",
    "data.window_shards=1",
)
IN_THE_SECOND = "data.phases[1].context=2"
LIMIT = 240.0


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.runs_dir) / recipe.name


def _try(recipe: Recipe, ranks: int, killed_after: int = 0) -> int:
    """Trains in forked ranks, which note the layout that they build, and all end alike: with this status.

    With ``killed_after`` each kills itself after so many batches.
    """
    import train.run
    from train.step.step import TrainingStep

    log, build = _folder(recipe).with_suffix(".log"), train.run.build_mesh
    train_to_end = trainer(recipe)

    def work(topology: Topology) -> None:
        def noted(layout: Parallelism, *more: Any) -> Any:
            with _folder(recipe).with_suffix(".built").open("a") as built:
                built.write(f"{topology.rank}:{layout.context}\n")
            return build(layout, *more)

        begin = TrainingStep.batch_start

        def killed(self: TrainingStep, state: Any, logger: Any) -> None:
            begin(self, state, logger)
            if killed_after and state.timestamp.batch.value == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)

        train.run.build_mesh = noted
        TrainingStep.batch_start = killed  # type: ignore[method-assign]
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # the log, and not what pytest captures
        train_to_end(topology)

    with Ranks(ranks, work, log) as processes:
        codes = processes.exit_codes(LIMIT)
    assert len(set(codes)) == 1, log.read_text()[-2000:]
    return int(codes[0] or 0)


def _built(recipe: Recipe) -> list[set[str]]:
    """Returns the context parallelism of each try, by rank."""
    lines = _folder(recipe).with_suffix(".built").read_text().split()
    return [set(lines[first : first + 2]) for first in range(0, len(lines), 2)]


def _losses(recipe: Recipe) -> list[dict[str, float]]:
    steps = read_steps(_folder(recipe) / METRICS_FILE)
    assert [step["step"] for step in steps] == list(range(1, 9))
    return [{k: v for k, v in step.items() if k.startswith("loss/") or k == metrics.PHASE} for step in steps]


def _books(recipe: Recipe) -> tuple[list[dict[str, Any]], object]:
    """Returns the lines of a run's data log, which must pass its audit, and its place in the curriculum."""
    folder = _folder(recipe)
    assert prove(RunData(folder)).faults == []
    lines = [{k: v for k, v in line.items() if k != "time"} for line in read_steps(folder / DATA_LOG_FILE)]
    last = read_progress(folder / CHECKPOINTS_FOLDER / "batch-00000008")
    return lines, (last.samples, last.tokens, last.consumed, last.curriculum)


def _assert_equal(found: Recipe, expected: Recipe) -> None:
    assert _books(found) == _books(expected)
    for step, (of_found, of_expected) in enumerate(zip(_losses(found), _losses(expected), strict=True), 1):
        assert of_found == pytest.approx(of_expected, rel=1e-5), step


@pytest.fixture(scope="module")
def make(tiny_recipe: TinyRecipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Makes recipes of two phases, which are valid on 2 ranks or, without a layout, on one."""
    folder = tmp_path_factory.mktemp("layouts")

    def recipe(name: str, *overrides: str) -> Recipe:
        found: Recipe = tiny_recipe(folder, folder / "shards", name, *PHASES, *overrides)
        ranks = 2 if overrides else 1
        validate(found, Topology(0, ranks, 0, ranks), name)
        return found

    import_for_runs()
    return recipe


@pytest.fixture(scope="module")
def whole(make: Callable[..., Recipe]) -> Recipe:
    """An undisturbed run on one process."""
    recipe = make("whole")
    assert _try(recipe, 1) == 0
    return recipe


@pytest.mark.parametrize("expert", [1, 2])
def test_the_supervisor_changes_the_layout_where_the_long_phase_begins(
    make: Callable[..., Recipe],
    whole: Recipe,
    expert: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread = f"parallelism.expert={expert}"
    recipe = make(f"phased-{expert}", spread, IN_THE_SECOND)
    shared = make(f"shared-{expert}", spread, "parallelism.context=2")
    assert _try(shared, 2) == 0

    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path))
    said: list[str] = []
    waits: list[float] = []
    supervisor = Supervisor(
        lambda _: _try(recipe, 2), Policy(restarts=0, same_batch=1), tmp_path, say=said.append
    )
    supervisor.sleep = waits.append
    assert supervisor.run() == 0

    tries = [(line["kind"], line["status"], line["batch"]) for line in read_log(tmp_path)]
    assert tries == [("preempted", PREEMPTED_STATUS, 4), ("finished", 0, 8)]
    assert waits == [0.0]
    assert "the next phase has another layout" in said[0] and "starting again from batch 4 in 0 s" in said[0]
    assert _built(recipe) == [{"0:1", "1:1"}, {"0:2", "1:2"}]
    assert not (_folder(recipe) / "changes.json").exists()
    assert "context: 1" in (_folder(recipe) / RECIPE_FILE).read_text().partition("parallelism:")[2][:200]
    _assert_equal(recipe, shared)
    _assert_equal(recipe, whole)


def test_the_same_command_continues_it_from_copies_in_memory_too(
    make: Callable[..., Recipe], whole: Recipe
) -> None:
    saves = ("checkpoint.memory_interval_batches=1", "checkpoint.interval_batches=100")
    recipe = make("twice", IN_THE_SECOND, *saves)
    log = _folder(recipe).with_suffix(".log")
    assert _try(recipe, 2) == PREEMPTED_STATUS
    line = "saved and ended after batch 4 with status 75: data.phases[1].context is 2, up to here it was 1"
    assert f"{line}; the same command continues the run" in log.read_text()
    assert _try(recipe, 2, killed_after=7) == -signal.SIGKILL
    assert _try(recipe, 2) == 0
    assert "resumed from the copy in memory of batch " in log.read_text()
    assert _try(recipe, 2) == 0  # Nothing is left.
    assert _built(recipe) == [{"0:1", "1:1"}, *[{"0:2", "1:2"}] * 2]
    _assert_equal(recipe, whole)


def test_a_checkpoint_that_cannot_be_written_is_a_failure_and_no_reason_to_begin_again(
    make: Callable[..., Recipe],
) -> None:
    from train.step.step import TrainingStep

    recipe = make("full", IN_THE_SECOND, "checkpoint.interval_batches=100")
    root, train_to_end = _folder(recipe) / CHECKPOINTS_FOLDER, trainer(recipe)

    def work(topology: Topology) -> None:
        begin = TrainingStep.batch_start

        def without_folder(self: TrainingStep, state: Any, logger: Any) -> None:
            begin(self, state, logger)
            if state.timestamp.batch.value == 3 and topology.is_main:
                root.write_text("no folder")

        TrainingStep.batch_start = without_folder  # type: ignore[method-assign]
        train_to_end(topology)

    line = r"data.phases\[1\].context is 2.* batch 4 could not be saved"
    with (
        Ranks(2, work, _folder(recipe).with_suffix(".log")) as processes,
        pytest.raises(RankError, match=line),
    ):
        processes.results(LIMIT)
