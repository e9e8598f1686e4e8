"""Ladders: the runs that their files define, and one that is interrupted and completed."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.loader import build_validation_loaders
from data.opened import OpenedData
from launch.experiments.ladder import __main__ as ladder
from launch.experiments.ladder import search
from launch.experiments.ladder.plan import LadderPlan, Run
from launch.experiments.ladder.results import read_results_file
from launch.experiments.ladder.runner import OVERHEAD_SECONDS, Timing, Timings
from launch.experiments.ladder.search import (
    MOST_TRIED,
    best_of,
    beyond,
    chosen,
    lowest_of_parabola,
    search_rates,
    summary_lines,
)
from tests.train.report.test_report import SUMMARY
from train.hf.average_option import Average
from train.hf.open_decoder import open_decoder
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.exit_status import REPLAY_STATUS
from train.recipe.transfer import transfer_base_of, transfer_scales
from train.record.summary import write_summary

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).parents[3] / "yamls"
OF_SIZES = [YAMLS / "ladder.yaml", YAMLS / "ladder-long.yaml"]
EFFICIENCY = YAMLS / "ladder-efficiency.yaml"
LADDERS = [*OF_SIZES, EFFICIENCY, *sorted(YAMLS.glob("ablations/*.yaml"))]

TINY = """
name: tiny
families:
  dense: {{ recipe: {recipe}, overrides: [model.moe=null, model.ffn_hidden_size=64] }}
  fine: {{ recipe: {recipe} }}
seeds: [1, 2]
baseline: dense
matched: 0.2
search: {{ seeds: [9], multipliers: {{ one: [0.5, 1] }} }}
"""
BLOCKS = """
name: blocks
families:
  dense: {{ recipe: {recipe}, overrides: [model.moe=null, model.ffn_hidden_size=64] }}
  fine: {{ recipe: {recipe}, rate_of: dense }}
  high: {{ recipe: {recipe}, rate_of: dense, overrides: [optimizer.learning_rate=1e30] }}
blocks:
  first: {{ families: [dense, fine], seeds: [1] }}
  second: {{ families: [fine, high], seeds: [1] }}
baseline: dense
matched: 0.2
counts_diverged: true
average: 2
search: {{ seeds: [9], multipliers: {{ one: [0.5, 1] }} }}
"""
SMALL = """
extends: {smoke}
model:
  d_model: 32
  n_layers: 1
  n_heads: 2
  n_kv_heads: 1
  ffn_hidden_size: 16
  vocab_size: 512
  max_sequence_tokens: 64
tokenizer:
  vocab_size: 512
data:
  shards: {shards}
  corpus_bytes: 2000000
  sequence_tokens: 64
  validation_sequences: 8
  workers: 0
training:
  duration_tokens: 2048
  loss_chunk_tokens: 64
schedule:
  warmup_tokens: 512
evaluation:
  interval_batches: null
checkpoint:
  interval_batches: null
  keep_last: 2
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL.format(smoke=YAMLS / "smoke.yaml", shards=".cache/shrunken-shards-512-64"))
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(recipe=recipe))
    return path


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_ladders_that_come_with_the_project_are_sound(path: Path) -> None:
    plan = LadderPlan(path)
    runs = [*plan.search_runs(), *plan.runs()]
    assert len({run.recipe.name for run in runs}) == len(runs) > 3


@pytest.mark.parametrize("path", OF_SIZES, ids=lambda path: path.stem)
def test_families_train_with_equal_flops_on_equal_data(path: Path) -> None:
    plan = LadderPlan(path)
    for size in plan.ladder.sizes:
        runs = [run for run in plan.runs() if run.size == size]
        flops = {run.family: sizes.flops_per_token_training(run.recipe.model, 256).total for run in runs}
        assert max(flops.values()) / min(flops.values()) < 1.02
        assert len({repr((run.recipe.data, run.recipe.tokenizer, run.recipe.schedule)) for run in runs}) == 1
        assert len({run.recipe.training.duration_tokens for run in runs}) == 1
        assert sorted({run.recipe.seed for run in runs}) == plan.ladder.seeds
    finest = {run.size for run in plan.runs() if run.family == "finest"}
    assert finest == {"l"}


def test_a_ladder_is_interrupted_and_completed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rates per family; another test checks the search beyond the edge.
    monkeypatch.setattr(search, "MOST_TRIED", 2)
    arguments = [str(tiny), f"runs_dir={tmp_path}/runs", "--json", str(tmp_path / "figures.json")]
    # First the search and one family, then the rest, without training anything again.
    assert ladder.main([*arguments, "--only", "*dense*", "--no-mlflow"]) == ladder.INCOMPLETE_STATUS
    assert "2 of 4 runs are missing" in capsys.readouterr().out
    folder = tmp_path / "runs/tiny"
    before = (folder / "timings.jsonl").read_text()
    assert ladder.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 runs to train" in printed and "fine: learning rate" in printed
    assert (folder / "timings.jsonl").read_text().startswith(before)
    assert len(before.splitlines()) == 6 and len((folder / "timings.jsonl").read_text().splitlines()) == 8
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {(cell["family"], cell["seeds"]) for cell in figures["cells"]} == {("dense", 2), ("fine", 2)}
    assert_sent(tmp_path / "runs")
    assert ladder.main([*arguments, "--no-mlflow"]) == 0


def test_blocks_follow_each_other_and_leave_a_line_for_each_run(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_TRIED", 2)
    path = tmp_path / "blocks.yaml"
    path.write_text(BLOCKS.format(recipe=tmp_path / "small.yaml"))
    overrides = [f"runs_dir={tmp_path}/runs", "checkpoint.interval_batches=1", "training.precision=fp32"]
    assert ladder.main([str(path), *overrides, "--no-mlflow", "--workers", "1"]) == 0
    record = tmp_path / "runs/blocks/runs.csv"
    results = read_results_file(record)
    assert [result.run for result in results] == [
        *("blocks-dense-rate0.5", "blocks-dense-rate1", "blocks-dense-seed1", "blocks-fine-seed1"),
        "blocks-high-seed1",
    ]
    assert [math.isinf(result.loss) for result in results] == [r.family == "high" for r in results]
    for result in (it for it in results if it.family != "high"):
        assert result.losses.keys() == result.last.keys() == {"code", "prose"}
        assert result.cpu_seconds is not None and result.cpu_seconds > 0
    # The loss is that of the mean of two checkpoints, computed here from the weights themselves.
    trained = next(result for result in results if result.run == "blocks-fine-seed1")
    for average, losses in ((None, trained.last), (Average(2), trained.losses)):
        decoder, source = open_decoder(tmp_path / "runs/blocks-fine-seed1", device="cpu", average=average)
        assert source.recipe is not None
        for domain, loader in build_validation_loaders(
            OpenedData(source.recipe), rank=0, world_size=1
        ).items():
            with torch.no_grad():
                outputs = [
                    decoder(*(batch[k] for k in ("input_ids", "document_ids", "targets"))) for batch in loader
                ]
            total = sum(float(output.loss_sum) for output in outputs)
            assert total / sum(int(output.target_tokens) for output in outputs) == pytest.approx(
                losses[domain], abs=2e-6
            )
    # A line that is lost is written again; nothing is trained again.
    before = record.read_text().splitlines(keepends=True)
    record.write_text("".join(before[:-2]))
    capfd.readouterr()
    assert ladder.main([str(path), *overrides, "--no-mlflow"]) == 0
    assert "to train" not in capfd.readouterr().out
    assert [result.run for result in read_results_file(record)] == [result.run for result in results]


def test_a_run_that_is_stopped_continues(tiny: Path, tmp_path: Path) -> None:
    arguments = [str(tiny), f"runs_dir={tmp_path}/runs", "checkpoint.interval_batches=1", "--no-mlflow"]
    command = [sys.executable, "-m", "launch.experiments.ladder", *arguments, "--workers", "1", "--nice", "3"]
    log = tmp_path / "runs/tiny-dense-rate0.5/metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (log.is_file() and log.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 3
        child = next(
            int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        )
        process.terminate()
        assert process.wait(60) in (130, 143)
    assert not Path(f"/proc/{child}").exists()
    from launch.experiments.ladder.runner import train_missing

    runs = LadderPlan(tiny, overrides=arguments[1:3]).search_runs()[:1]
    assert train_missing(runs, tmp_path / "again", workers=1, deadline=None) == []


def assert_sent(runs: Path) -> None:
    """Asserts that there is one experiment, its parent, and each run below it with its losses."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = found.pop("tiny")
    assert parent.info.status == "FINISHED"
    assert "comparison.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert len(found) == 8
    for run in found.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["Loss/validation/code"] > 0


def test_time_is_predicted_from_the_nearest_run_of_the_family(tmp_path: Path) -> None:
    plan = LadderPlan(YAMLS / "ladder.yaml")
    timings = Timings(tmp_path / "timings.jsonl")
    large = next(run for run in plan.runs() if (run.family, run.size) == ("fine", "l"))
    for family, flops, training in (("fine", 1e12, 50), ("fine", 1e13, 300), ("dense", 8e13, 10)):
        timings.add(Timing("r", family, flops, 1.0, OVERHEAD_SECONDS + training))
    assert timings.predict(large) == pytest.approx(OVERHEAD_SECONDS + large.flops / 1e13 * 300)


def test_the_search_continues_until_the_best_rate_lies_between_others(tiny: Path, tmp_path: Path) -> None:
    plan = LadderPlan(tiny, overrides=[f"runs_dir={tmp_path}"])
    best = {"dense": 4.0, "fine": 0.125}

    def train(runs: Sequence[Run]) -> list[Run]:
        for run in runs:
            folder = tmp_path / run.recipe.name
            folder.mkdir(exist_ok=True)
            loss = 3 + abs(math.log2(run.multiplier / best[run.family]))
            write_summary(folder, replace(SUMMARY, validation_loss={"code": loss}))
        return []

    runs, losses = search_rates(plan, train)
    assert chosen(losses) == {("dense", "one"): 4.0, ("fine", "one"): 0.125}
    assert sorted(losses["dense", "one"]) == [0.5, 1, 2, 4, 8]
    assert sorted(losses["fine", "one"]) == [0.0625, 0.125, 0.25, 0.5, 1]
    assert len({run.recipe.name for run in runs}) == 10
    assert (
        "dense: learning rate 4x the recipe's (0.5x" in summary_lines(losses)[0]
        and "edge" not in summary_lines(losses)[0]
    )
    counted = {(run.family, run.multiplier) for run in plan.runs(chosen(losses))}
    assert counted == {("dense", 4.0), ("fine", 0.125)}
    # An incomplete search chooses nothing.
    assert search_rates(plan, list)[1] == {}


def test_the_lowest_point_of_a_parabola_is_found() -> None:
    def curve(lowest: float, *rates: float) -> dict[float, float]:
        return {rate: 3 + 0.1 * math.log2(rate / lowest) ** 2 for rate in rates}

    assert lowest_of_parabola(curve(5.0, 2, 4, 8, 16)) == 5.0
    assert lowest_of_parabola(curve(5.0, 2, 4, 8) | {16.0: math.nan}) == 5.0
    # Nowhere, or outside of what was tried: the best that was tried.
    assert lowest_of_parabola({rate: -loss for rate, loss in curve(5.0, 2, 4, 8).items()}) == 2.0
    assert lowest_of_parabola(curve(40.0, 2, 4, 8)) == 8.0
    assert lowest_of_parabola({2.0: 3.0, 4.0: 2.0}) == 4.0
    losses = {("fine", "s"): curve(5.0, 2, 4, 8)}
    assert chosen(losses, by_parabola=True) == {("fine", "s"): 5.0} and chosen(losses) == {("fine", "s"): 4.0}


def test_the_registered_plan_is_what_the_page_says() -> None:
    plan = LadderPlan(EFFICIENCY)
    blocks = plan.blocks
    assert list(blocks) == [
        "primary-a",
        "muon",
        "primary-b",
        "granularity",
        "tokens-20",
        "tokens-100",
        "routing",
    ]
    of_primary = [run for name in ("primary-a", "primary-b") for run in plan.runs_of(blocks[name])]
    for family in ("coarse", "fine"):
        for size in ("s", "m"):
            own = [run for run in of_primary if (run.family, run.size) == (family, size)]
            assert sorted(run.seed for run in own) == list(range(1, 21))
            assert {run.recipe.data.validation_sequences for run in own} == {1024}
            assert {run.recipe.schedule.final_share for run in own} == {0.0}
    # Fine is trained at the rate that is best for coarse.
    searched = plan.search_runs(blocks["primary-a"])
    assert {(run.family, run.size) for run in searched} == {("coarse", "s"), ("coarse", "m")}
    assert {run.seed for run in plan.search_runs()} == {101, 102, 103, 104}
    rates = {("coarse", "s"): 5.0, ("coarse", "m"): 6.0, ("muon", "s"): 3.0, ("g16", "g"): 2.0}
    found = {(run.family, run.size): run.multiplier for run in plan.runs(rates)}
    assert (found["fine", "s"], found["fine", "m"], found["fine-100", "s"]) == (5.0, 6.0, 5.0)
    assert (found["muon", "s"], found["muon", "m"], found["g64", "g"]) == (3.0, 3.0, 2.0)
    # 20, 50 and 100 tokens per active parameter.
    per_parameter = {
        run.family: sizes.trained_tokens(run.recipe) / sizes.active_parameters(run.recipe.model)
        for run in plan.runs()
        if run.size == "s"
    }
    assert [round(per_parameter[name], -1) for name in ("fine-20", "fine", "fine-100")] == [20, 50, 100]


def test_a_diverged_run_is_never_the_best_and_an_end_comes() -> None:
    assert best_of({1.0: 3.0, 2.0: math.nan}) == 1.0
    assert beyond({1.0: 3.0, 2.0: 2.9, 4.0: math.nan}) is None
    assert beyond({2.0**place: -place for place in range(MOST_TRIED)}) is None


def test_a_rate_is_judged_by_the_mean_over_the_search_s_seeds(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(tiny.read_text().replace("seeds: [9], mult", "seeds: [9, 8], mult"))
    plan = LadderPlan(tiny, overrides=[f"runs_dir={tmp_path}"])
    # 1 is best with the first seed, 0.5 with both.
    loss_of = {(0.25, 9): 3.5, (0.5, 9): 3.1, (1, 9): 3.0, (2, 9): 3.2}
    loss_of |= {(0.25, 8): 3.5, (0.5, 8): 3.1, (1, 8): 3.4, (2, 8): 3.2}

    def train(runs: Sequence[Run]) -> list[Run]:
        for run in runs:
            folder = tmp_path / run.recipe.name
            folder.mkdir(exist_ok=True)
            loss = {"code": loss_of[run.multiplier, run.recipe.seed]}
            write_summary(folder, replace(SUMMARY, validation_loss=loss))
        return []

    runs, losses = search_rates(plan, train)
    assert chosen(losses) == {("dense", "one"): 0.5, ("fine", "one"): 0.5}
    assert losses["fine", "one"] == pytest.approx({0.25: 3.5, 0.5: 3.1, 1: 3.2})
    # Adding a seed does not change the names of the first seed's runs.
    names = {run.recipe.name for run in runs if run.family == "fine"}
    assert {"tiny-fine-rate1", "tiny-fine-rate1-seed8"} < names and len(names) == 6
    assert search_rates(plan, list)[1] == {}


def test_a_rate_at_which_a_run_diverges_is_excluded(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_TRIED", 2)
    text = tiny.read_text().replace("[0.5, 1]", "[1, 1e30]").replace("baseline: dense", "baseline: fine")
    text = text.replace("seeds: [1, 2]", "seeds: [1]")
    tiny.write_text("".join(line for line in text.splitlines(keepends=True) if "dense:" not in line))
    arguments = [str(tiny), f"runs_dir={tmp_path}/runs", "--only", "nothing"]
    assert ladder.main(arguments) == ladder.INCOMPLETE_STATUS
    printed = capfd.readouterr().out
    assert printed.count("diverged within") == 1 and printed.count("1e+30x diverged)") == 1
    assert "fine: learning rate 1x the recipe's" in printed
    # It was retried first: a transient hardware error would not have recurred.
    assert printed.count(f"ended with status {REPLAY_STATUS}") == 2
    # It stays abandoned, and no other run's time is predicted from its own.
    assert ladder.main(arguments) == ladder.INCOMPLETE_STATUS
    assert "to train" not in capfd.readouterr().out
    assert len(Timings(tmp_path / "runs/tiny/timings.jsonl").read()) == 1
    # A run outside the search is never abandoned.
    tiny.write_text(tiny.read_text().replace("search:", "#"))
    assert ladder.main([str(tiny), f"runs_dir={tmp_path}/high", "optimizer.learning_rate=1e30"]) == 2
    assert "-seed1: ended early: a step is not finite, twice" in capfd.readouterr().err


def test_a_size_without_a_search_takes_the_rate_of_the_one_before() -> None:
    plan = LadderPlan(YAMLS / "ladder-long.yaml")
    rates = {("dense", "s"): 8.0, ("dense", "m"): 4.0, ("fine", "s"): 2.0, ("fine", "m"): 1.0}
    found = {(run.family, run.size): run.multiplier for run in plan.runs(rates)}
    assert [found["dense", size] for size in "sml"] == [8, 4, 4]
    assert found["finest", "l"] == found["fine", "l"] == 1


def test_one_search_serves_every_family_and_size(tmp_path: Path) -> None:
    plan = LadderPlan(YAMLS / "ladder.yaml", transfer="fine:s", overrides=[f"runs_dir={tmp_path}"])
    searched = plan.search_runs()
    assert {(run.family, run.size) for run in searched} == {("fine", "s")} and len(searched) == 3
    runs = plan.runs({("fine", "s"): 2.0})
    assert {run.multiplier for run in runs} == {2.0}
    (base,) = {run.recipe.model.transfer_base for run in runs}
    assert base == transfer_base_of(searched[0].recipe.model)
    assert len({repr(run.recipe.optimizer) for run in runs}) == 1
    # The same runs as without, of other names.
    others = LadderPlan(YAMLS / "ladder.yaml").runs({("fine", "s"): 2.0})
    assert [(run.family, run.size) for run in runs] == [(run.family, run.size) for run in others]
    assert {run.recipe.name for run in runs}.isdisjoint(run.recipe.name for run in others)
    assert [replace(run.recipe.model, transfer_base=None) for run in runs] == [
        run.recipe.model for run in others
    ]
    # Twice the base's width: half the rate of what reads the stream, whatever the experts.
    wide = [run.recipe.model for run in runs if run.size == "l"]
    assert {transfer_scales(model, "blocks.0.ffn.router.layer.weight").rate for model in wide} == {0.5}


@pytest.mark.parametrize(
    ("transfer", "said"),
    [("sparse:s", "name one of dense, coarse, fine, finest"), ("fine:m", "searched sizes are s")],
)
def test_a_base_that_is_not_searched_is_refused(transfer: str, said: str) -> None:
    with pytest.raises(UserError, match=f"--transfer: is {transfer}; {said}"):
        LadderPlan(YAMLS / "ladder.yaml", transfer=transfer)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("baseline: dense", "baseline: sparse", "baseline: is sparse; name one of dense, fine"),
        ("matched: 0.2", "matched: 0.0001", "FLOPs at size one"),
        ("seeds: [9]", "seeds: [9, 2]", "search.seeds: has 2, one of the ladder's"),
        ("seeds: [9]", "seeds: []", "search.seeds: is empty; give one or more"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds: is [1, 1]; give each once"),
        ("seeds: [1, 2]", "sizes: [one, one]\nseeds: [1, 2]", "sizes: is ['one', 'one']; give each once"),
        ("one: [0.5, 1]", "one: [1, 1, 2]", "search.multipliers.one: is [1.0, 1.0, 2.0]; give each once"),
        ("seeds: [1, 2]", "seedz: [1, 2]", "seedz"),
        ("one: [0.5, 1]", "two: [0.5, 1]", "search.multipliers.two: is not a size; sizes are one"),
        ("one: [0.5, 1]", "one: [1]", "search.multipliers.one: is [1.0]; give two or more"),
        (
            "seeds: [1, 2]",
            "seeds: [1, 2]\nblocks: { b: { families: [fine], seeds: [3] } }",
            "are given, and blocks",
        ),
        ("seeds: [1, 2]", "blocks: { b: { families: [fine], seeds: [9] } }", "search.seeds: has 9"),
        (
            "seeds: [1, 2]",
            "blocks: { b: { families: [x], seeds: [3] } }",
            "blocks.b.families: has x; families are",
        ),
        (
            "seeds: [1, 2]",
            "blocks: { b: { families: [fine], seeds: [3], sizes: [s] } }",
            "blocks.b.sizes: has s",
        ),
        ("seeds: [1, 2]", "average: 1\nseeds: [1, 2]", "average: is 1; give 2 or more, or null"),
    ],
)
def test_errors_take_one_line(
    tiny: Path, before: str, after: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny.read_text()
    assert before in text
    tiny.write_text(text.replace(before, after))
    assert ladder.main([str(tiny), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert said in error and str(tiny) in error and error.count("\n") == 1


def test_a_run_that_fails_is_named(tiny: Path, tmp_path: Path) -> None:
    plan = LadderPlan(tiny, overrides=[f"runs_dir={tmp_path}/runs"])
    folder = tmp_path / "runs/tiny-dense-rate0.5"
    folder.mkdir(parents=True)
    (folder / "something").touch()
    from launch.experiments.ladder.runner import train_missing

    with pytest.raises(UserError, match=r"tiny-dense-rate0.5: ended early: .*logs/tiny-dense-rate0.5.log"):
        train_missing(plan.search_runs(), tmp_path / "ladder", workers=1, deadline=None)
