"""The planner's command line: figures, files, errors."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan import __main__ as plan
from launch.plan.hardware import GPUS, Gpu
from launch.plan.search import choice_of, remedies, search, sufficient_changes
from launch.plan.step import make_plan
from launch.plan.step_time import FITTED, Efficiency, link_seconds
from launch.plan.table5 import table5
from launch.plan.traffic import Collective, CollectiveKind
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.schema import Parallelism, Recipe, Recompute

ROOT = Path(__file__).resolve().parents[3]
YAMLS = ROOT / "yamls"
H100 = GPUS["h100"]


def recipe(stem: str, *overrides: str) -> Recipe:
    return load_recipe(YAMLS / f"{stem}.yaml", list(overrides))


def test_table5_gives_the_announcements_ratios() -> None:
    rows = {row.recipe: row for row in table5()}
    assert {name: f"{row.relative_flops:.1f}x" for name, row in rows.items() if row.published_relative} == {
        "dbrx-moe-a": "1.0x",
        "mpt-7b": "3.7x",
        "dbrx-dense-a": "3.7x",
        "dbrx-dense-a-500b": "1.9x",
        "dbrx-moe-b": "1.0x",
        "llama2-13b": "1.7x",
    }
    assert f"{rows['dbrx-dense-a-500b'].relative_flops:.2f}x" == "1.85x"
    assert {row.recipe for row in rows.values() if row.tokens_source == "inferred"} == {
        "dbrx-moe-a",
        "dbrx-moe-b",
    }
    assert f"{rows['dbrx'].flops:.3g}" == "2.58e+24"


def test_forced_balance_is_said_by_every_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forced = recipe("dbrx-moe-a", "model.moe.forced_balance=true")
    with pytest.raises(UserError, match=r"name: 'dbrx-moe-a' hides .* call it dbrx-moe-a-forced-balance"):
        make_plan(forced, 64, H100)
    page, figures = tmp_path / "plan.html", tmp_path / "plan.json"
    options = ["model.moe.forced_balance=true", "name=forced-balance", "--gpus", "64"]
    outputs = ["--html", str(page), "--json", str(figures)]
    assert plan.main([str(YAMLS / "dbrx-moe-a.yaml"), *options, *outputs]) == 0
    assert "on 64 x h100, forced balance" in capsys.readouterr().out
    assert "forced balance" in page.read_text()
    assert json.loads(figures.read_text())["forced_balance"] is True


def test_a_plan_from_the_command_line_needs_no_torch() -> None:
    code = (
        "import sys; from launch.plan.__main__ import main; "
        f"status = main([{str(YAMLS / 'dbrx.yaml')!r}, '--gpus', '3072']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in (
        "memory of the fullest GPU",
        "InfiniBand",
        "time of a step",
        "GPU-hours",
        "nearest to its limit",
    ):
        assert part in done.stdout


def test_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = [str(YAMLS / "dbrx-moe-a.yaml"), "--gpus", "64", "--price", "2"]
    assert plan.main([*arguments, "--json", str(figures), "--html", str(page)]) == 0
    read = json.loads(figures.read_text())
    assert read["dollars"] == pytest.approx(2 * read["gpu_hours"])
    assert read["memory_bytes"]["total"] == sum(
        size for part, size in read["memory_bytes"].items() if part not in ("total", "limit")
    )
    assert f"{read['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU" in capsys.readouterr().out
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "rank 7" in html
    assert "time, ms" in html
    matrix = re.search(
        r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)".*<title>backward, matrix products: ([\d.]+)', html
    )
    assert matrix
    width_per_ms = float(matrix[2]) / float(matrix[3]) / 1e3
    lines = [float(x) for x in re.findall(r'<line x1="([\d.]+)".*stroke-opacity', html)]
    times = [float(text) for text in re.findall(r'">([\d,.]+)</text>', html.replace(",", ""))]
    assert len(lines) == len(times) > 3
    assert lines == pytest.approx([90 + time * width_per_ms for time in times], rel=0.02)
    assert not re.search(r"(?:src|href)\s*=", html), "the page must need nothing else"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["yamls/dbrx.yaml", "--gpus", "100"], "data.phases[0].global_batch_sequences"),
        (["yamls/dbrx.yaml", "--gpus", "0"], "--gpus"),
        (["yamls/dbrx.yaml", "--gpus", "3072", "--gpu", "tpu"], "one of h100"),
        (["yamls/dbrx.yaml", "--gpus", "3072", "--imbalance", "0.5"], "--imbalance"),
        (["yamls/dbrx.yaml", "parallelism.expert=3", "--gpus", "3072"], "parallelism"),
        (
            ["yamls/dbrx-35b.yaml", "parallelism.expert=8", "parallelism.replicate=1", "--gpus", "768"],
            "training",
        ),
        (["yamls/dbrx.yml", "--gpus", "8"], "did you mean"),
        ([], "RECIPE"),
    ],
)
def test_mistakes_take_one_line_each(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.main(arguments) == USAGE_STATUS
    lines = capsys.readouterr().err.splitlines()
    assert any(part in line for line in lines)
    assert len(lines) == 1 or all(line.startswith(arguments[0]) for line in lines)


@pytest.mark.slow
def test_an_impossible_plan_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(YAMLS / "dbrx.yaml"), "training.recompute=nothing", "--gpus", "3072"]
    assert plan.main(arguments) == plan.DOES_NOT_FIT_STATUS
    told = capsys.readouterr().out
    assert "does NOT fit" in told
    assert "training.recompute=gates by itself makes it fit" in told
    fastest = re.search(r"fastest that fits: (.*)", told)
    assert fastest
    changed = recipe("dbrx", *fastest.group(1).split())
    assert make_plan(changed, 3072, H100).fits


def test_too_few_gpus_name_a_number_that_is_enough() -> None:
    small = recipe(
        "dbrx", "training.global_batch_sequences=8", "parallelism.replicate=1", "parallelism.expert=8"
    )
    told = remedies(
        make_plan(replace(small, training=replace(small.training, microbatch_sequences=1)), 8, H100)
    )
    assert told[-1].startswith("nothing fits 8 GPUs: use ")


def test_rows_that_fsdp_cannot_split_evenly_are_refused() -> None:
    uneven = recipe("dbrx-moe-a", "parallelism.expert=4", "training.global_batch_sequences=1056")
    with pytest.raises(UserError, match="do not shard evenly"):
        make_plan(uneven, 132, H100)


@pytest.mark.slow
def test_long_sequences_fit_few_gpus_where_ranks_share_them() -> None:
    """DBRX's last phase, 32,768 tokens a sequence, on 64: with experts over 4 a rank has no room for one."""
    keys = ["parallelism.replicate=1", "parallelism.expert=4", "training.recompute=layer"]
    whole, shared = (
        make_plan(recipe("dbrx", *keys, f"parallelism.context={context}"), 64, H100).others[0]
        for context in (1, 8)
    )
    assert shared.shape.recipe.data.sequence_tokens == 32768
    assert not whole.fits and shared.fits
    assert shared.microbatches == 8 * whole.microbatches
    assert (shared.memory.weights, shared.memory.optimizer) == (whole.memory.weights, whole.memory.optimizer)
    assert shared.memory.activations < whole.memory.activations / 6
    # As much arithmetic, and somewhat more traffic.
    assert shared.seconds.attention == pytest.approx(whole.seconds.attention)
    assert shared.step_seconds > whole.step_seconds


def test_copies_of_the_state_need_room_in_the_host() -> None:
    saves = ("parallelism.replicate=1", "checkpoint.memory_interval_batches=1")
    without, copied = recipe("dbrx", saves[0]), recipe("dbrx", *saves)
    state = make_plan(copied, 64, GPUS["h100"]).memory
    needed = 5 * (state.weights + state.optimizer)
    large = replace(GPUS["h100"], memory_bytes=2**40)
    for host, fits in ((2 * needed, True), (2 * needed - 2, False)):
        gpu = replace(large, host_memory_bytes=host)
        assert make_plan(without, 64, gpu).fits and not make_plan(without, 64, gpu).copies_bytes
        assert (make_plan(copied, 64, gpu).copies_bytes, make_plan(copied, 64, gpu).fits) == (needed, fits)


@pytest.mark.slow
def test_inputs_that_wait_need_room_in_the_host() -> None:
    keys = ("parallelism.replicate=1", "training.recompute=layer")
    without, waiting = recipe("dbrx", *keys), recipe("dbrx", *keys, "training.offload=true")
    # 39 buffers of 32,768 x 6,144 bf16 elements, 384 MiB, for each of which torch pins 512.
    needed = 39 * 512 * 2**20
    roomy = replace(GPUS["h100"], memory_bytes=70 * 2**30)
    tight = replace(roomy, host_memory_bytes=2 * needed - 1)
    assert make_plan(waiting, 64, roomy).host_bytes == needed and not make_plan(without, 64, roomy).host_bytes
    remedy = "training.offload=true by itself makes it fit"
    for gpu, is_enough in ((roomy, True), (tight, False)):
        assert make_plan(waiting, 64, gpu).fits == is_enough
        assert (remedy in sufficient_changes(make_plan(without, 64, gpu))) == is_enough


def test_search_lets_as_few_ranks_share_sequences_as_will_do() -> None:
    """Of DBRX's 32k phase by itself none, and two with twice the tokens."""
    phase = make_plan(recipe("dbrx"), 3072, H100).others[0].shape.recipe
    for tokens, expected in ((32768, 1), (65536, 2)):
        longer = replace(
            phase,
            model=replace(phase.model, max_sequence_tokens=tokens),
            training=replace(phase.training, global_batch_sequences=128),
            data=replace(phase.data, domains={"web": 1.0}, sequence_tokens=tokens),
        )
        found = [plan.recipe.parallelism for plan in search(longer, 64, H100)]
        assert {layout.sharing for layout in found} == {expected}
        assert {layout.tensor for layout in found} == {1, expected}, "by either way"


@pytest.mark.slow
def test_search_ranks_what_fits_by_speed() -> None:
    plans = search(recipe("dbrx-moe-a"), 64, H100)
    assert all(found.fits for found in plans)
    times = [found.step_seconds for found in plans]
    assert times == sorted(times)
    own = make_plan(recipe("dbrx-moe-a"), 64, H100)
    assert times[0] <= own.step_seconds
    assert choice_of(own.recipe) in [choice_of(found.recipe) for found in plans]


def test_a_step_takes_longer_with_less_of_anything() -> None:
    base = make_plan(recipe("dbrx"), 3072, H100)
    slower = [
        make_plan(recipe("dbrx"), 3072, replace(H100, matrix_flops=H100.matrix_flops / 2)),
        make_plan(recipe("dbrx"), 3072, replace(H100, memory_bandwidth=H100.memory_bandwidth / 2)),
        make_plan(recipe("dbrx"), 3072, replace(H100, network_bandwidth=H100.network_bandwidth / 2)),
        make_plan(recipe("dbrx"), 3072, H100, imbalance=1.5),
        make_plan(recipe("dbrx"), 3072, H100, efficiency=Efficiency(matrix=0.3)),
    ]
    assert all(found.step_seconds > base.step_seconds for found in slower)
    assert base.step_seconds < base.step_seconds_if_added


def seconds_of(collectives: list[Collective], gpu: Gpu) -> float:
    """Time of a step of one microbatch in which nothing else runs."""
    return link_seconds(collectives, gpu, replace(FITTED, links=FITTED.collectives)).links


@pytest.mark.parametrize("expert", [1, 8, 16])
def test_traffic_is_open_or_hidden(expert: int) -> None:
    found = make_plan(recipe("dbrx", f"parallelism.expert={expert}"), 3072, H100)
    assert found.seconds.links + found.hidden_seconds == pytest.approx(seconds_of(found.collectives, H100))
    assert min(found.seconds.links, found.hidden_seconds) > 0


@pytest.mark.parametrize("expert", [8, 16])
def test_interleaving_hides_three_quarters_of_the_exchange_where_arithmetic_lasts(expert: int) -> None:
    """The rest of a step is the same but for products that read the weights twice."""
    plain, halved = (
        make_plan(recipe("dbrx", f"parallelism.expert={expert}", *more), 3072, H100)
        for more in ([], ["parallelism.interleave=true"])
    )
    (exchange,) = (c for c in plain.collectives if c.what == "tokens to experts and back")
    hidden = plain.seconds.links - halved.seconds.links
    assert hidden == pytest.approx(0.75 * seconds_of([exchange], H100), rel=0.02)
    assert halved.seconds.links + halved.hidden_seconds == pytest.approx(seconds_of(halved.collectives, H100))
    assert 1.0 < halved.seconds.memory / plain.seconds.memory < 1.2
    assert halved.memory.total < plain.memory.total
    odd = halved.others[0]
    assert odd.shape.recipe.training.microbatch_sequences == 1
    assert (odd.step_seconds, odd.memory) == (plain.others[0].step_seconds, plain.others[0].memory)


def test_a_step_takes_as_long_as_its_bytes_on_a_slow_network() -> None:
    slow = replace(H100, network_bandwidth=H100.network_bandwidth / 1000)
    found = make_plan(recipe("dbrx"), 3072, slow)
    between_nodes = [c for c in found.collectives if c.members_per_node(slow.gpus_per_node) < c.ranks]
    assert found.step_seconds == pytest.approx(seconds_of(between_nodes, slow), rel=0.01)


def test_on_a_fast_network_little_but_the_exchange_is_open() -> None:
    """Nothing hides the first gather of weights and the last reduction."""
    found = make_plan(recipe("dbrx"), 3072, replace(H100, network_bandwidth=50 * H100.network_bandwidth))
    exchange = [c for c in found.collectives if c.kind is CollectiveKind.all_to_all]
    rest = found.seconds.links - seconds_of(exchange, found.gpu)
    assert 0 < rest < 0.1 * found.hidden_seconds


def test_time_of_a_run_follows_from_its_step() -> None:
    found = make_plan(recipe("mpt-7b"), 64, H100, dollars_per_gpu_hour=3.0)
    steps = sizes.batches(found.recipe)
    assert found.gpu_hours == pytest.approx(steps * found.step_seconds * 64 / 3600)
    assert found.dollars == pytest.approx(3 * found.gpu_hours)
    tokens = found.tokens_per_second_per_gpu * 64 * found.days * 86400
    assert tokens == pytest.approx(sizes.trained_tokens(found.recipe))


def test_a_lone_gpu_sends_nothing() -> None:
    alone = replace(recipe("smoke"), parallelism=Parallelism())
    found = make_plan(alone, 1, H100)
    assert found.seconds.links == 0
    assert found.fits


PHASES = [
    "data.phases[0].tokens=1000000000",
    "data.phases[1].tokens=1000000000",
    "data.phases[2].tokens=1000000000",
    "data.phases[3].tokens=600000000",
    "training.duration_tokens=3600000000",
    "schedule.warmup_tokens=0",
]


def test_each_step_shape_is_planned_as_a_run_of_its_own() -> None:
    whole = recipe("dbrx", *PHASES)
    plan_of_run = make_plan(whole, 3072, H100)
    assert [plan.shape.phases for plan in plan_of_run.step_shapes] == [(0, 1, 2), (3,)]
    grades = (Recompute.gates, Recompute.layer)
    for plan_of_shape, length, batch, microbatch, grade in zip(
        plan_of_run.step_shapes, (4096, 32768), (6144, 3072), (2, 1), grades, strict=True
    ):
        training = replace(
            whole.training,
            global_batch_sequences=batch,
            microbatch_sequences=microbatch,
            recompute=grade,
        )
        tokens = plan_of_shape.shape.tokens
        alone = replace(
            whole,
            data=replace(whole.data, phases=[], domains={"web": 1.0}, sequence_tokens=length),
            training=replace(training, duration_tokens=tokens),
        )
        expected = make_plan(alone, 3072, H100)
        assert tokens == plan_of_shape.shape.batches * batch * length
        for quantity in ("memory", "collectives", "microbatches", "parts", "step_seconds", "utilisation"):
            assert getattr(plan_of_shape, quantity) == getattr(expected, quantity), quantity
    days = [plan.shape.batches * plan.step_seconds / 86400 for plan in plan_of_run.step_shapes]
    assert plan_of_run.days == pytest.approx(sum(days))
    assert plan_of_run.flops == sizes.training_flops(whole)
    assert sum(plan.shape.batches for plan in plan_of_run.step_shapes) == sizes.batches(whole)


def test_a_phase_is_planned_in_a_layout_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("parallelism.replicate=1", "parallelism.expert=4", "training.recompute=layer")
    without, phased = recipe("dbrx", *keys), recipe("dbrx", *keys, "data.phases[3].context=2")
    plans = {name: make_plan(each, 64, H100) for name, each in (("without", without), ("phased", phased))}
    all_shared = make_plan(recipe("dbrx", *keys, "parallelism.context=2"), 64, H100)
    (short, long), (same, _) = plans["phased"].step_shapes, plans["without"].step_shapes
    for quantity in ("memory", "collectives", "microbatches", "parts", "step_seconds"):
        assert getattr(short, quantity) == getattr(same, quantity), quantity
        assert getattr(long, quantity) == getattr(all_shared.others[0], quantity), quantity
    assert long.microbatches == 2 * plans["without"].others[0].microbatches
    # The last phase has no room by itself; were all phases to share sequences, the run would take longer.
    assert not plans["without"].fits and plans["phased"].fits and plans["phased"].days < all_shared.days
    assert "data.phases[3].context=2 by itself makes it fit" in sufficient_changes(plans["without"])
    command = [str(YAMLS / "dbrx.yaml"), *keys, "data.phases[3].context=2", "--gpus", "64"]
    assert plan.main(command) == 0
    _, title, *rows = capsys.readouterr().out.partition("phases, by what")[2].splitlines()
    place = title.split().index("context")
    # `1, 2, 3` are the phases of the first row.
    assert [rows[0].split()[2 + place], rows[1].split()[place]] == ["1", "2"]


@pytest.mark.slow
def test_a_run_fits_only_if_its_longest_phase_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "plan.json"
    # 65,536 tokens a sequence: the bulk of the run fits, the last phase does not.
    arguments = ["model.max_sequence_tokens=65536", "data.phases[3].sequence_tokens=65536"]
    command = [str(YAMLS / "dbrx.yaml"), *arguments, "--gpus", "3072", "--json", str(figures)]
    assert plan.main(command) == plan.DOES_NOT_FIT_STATUS
    told = json.loads(figures.read_text())
    short, long = told["forms"]
    assert short["memory_bytes"] < told["memory_bytes"]["limit"] < long["memory_bytes"]
    assert told["memory_bytes"]["total"] == long["memory_bytes"]
    assert told["days"] == pytest.approx(short["days"] + long["days"])
    assert "with 65536 tokens a sequence" in capsys.readouterr().out


def test_search_says_why_no_layout_is_possible() -> None:
    with pytest.raises(UserError, match=r"data\.phases\[3\]\.global_batch_sequences"):
        search(recipe("dbrx", "training.microbatch_sequences=1", "training.compile=blocks"), 6144, H100)


def test_experts_in_fp8_take_half_of_their_products_time() -> None:
    """Data sheets' peaks; what is quantised is read and written besides. Other GPUs are refused."""
    plain, scaled = (
        make_plan(recipe("dbrx", *more), 3072, H100) for more in ([], ["training.expert_precision=fp8"])
    )
    model = scaled.shape.recipe.model
    assert model.moe is not None
    tokens = sizes.tokens_per_batch(scaled.shape.recipe) / 3072
    rows = tokens * model.moe.top_k * model.n_layers
    passes = 3 + 2 / 3  # Gates are made again: two products of three.
    flops = passes * rows * 3 * 2 * model.d_model * sizes.expert_width(model)
    saved = plain.seconds.matrix - scaled.seconds.matrix
    assert saved == pytest.approx(flops * (1 / 989.5e12 - 1 / 1979e12) / FITTED.matrix, rel=1e-6)
    assert scaled.seconds.memory > plain.seconds.memory and scaled.step_seconds < plain.step_seconds
    with pytest.raises(UserError, match="is fp8, not for b200; set it to mxfp8"):
        make_plan(recipe("dbrx", "training.expert_precision=fp8"), 3072, GPUS["b200"])
