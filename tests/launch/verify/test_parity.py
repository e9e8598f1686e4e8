"""The parity gate passes correct layouts, and fails for every injected fault."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer import Logger, State

from launch.verify.__main__ import main
from launch.verify.case_run import (
    CaseOutcome,
    CaseRanks,
    compare_case,
    import_for_ranks,
    make_reference,
    run_case,
    train_case,
)
from launch.verify.cases import INPUTS, SEQUENCES, Case, Layout, cases, find_case, layouts, reference_of
from launch.verify.expert_faults import FINER, GLOBAL_SCOPE, Changes
from launch.verify.faults import FAULTS, KnownFault
from launch.verify.forked_ranks import RankError, run_ranks
from launch.verify.parity import ParityCheck
from launch.verify.watching import Comparer, Deviation, ReferenceRecord
from train.layout.torch_patches import TorchVersions
from train.model import router
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import OptimizerKind, Precision
from train.recipe.topology import Topology
from train.step import microbatch
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
SCOPE = "model.moe.balance_scope"
GLOBAL = f"{SCOPE}=global_batch"
HALVED = "parallelism.interleave=true parallelism.expert=2 training.microbatch_sequences=2"
TRADED = "parallelism.reduce=once_a_batch parallelism.gathered_layers=1 parallelism.reduce_precision=bf16"


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import_for_ranks()


@cache
def _reference(
    case_key: tuple[str, str, Changes, OptimizerKind | None, Precision],
    folder: Path,
    model: Changes = (),
    qk_clip: float | None = None,
) -> tuple[Case, int, Path]:
    """The case of a fault with its reference, cached for faults that share it."""
    name, layout, experts, optimizer, precision = case_key
    needs = KnownFault(
        "", nullcontext, "", experts=experts, optimizer=optimizer, model=model, qk_clip=qk_clip
    )
    recipe = needs.recipe_of(load_recipe(YAMLS / "smoke.yaml"))
    of_fault = next(fault.layout for fault in FAULTS.values() if str(fault.layout) == layout)
    case = find_case(recipe, of_fault, name, precision)
    file = (
        folder
        / f"{layout}-{name}-{len(experts)}-{optimizer}-{len(model) and model[0][0]}-{precision.value}.pt"
    )
    return case, make_reference(case, file), file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


SEEN = 1e-4
"""Far above rounding."""


class UntilSeen(Comparer):
    """Ends training after the step in which some rank has seen a fault in a quantity."""

    def __init__(self, quantity: str, *args: Any) -> None:
        super().__init__(*args)
        self.quantity = quantity

    def batch_end(self, state: State, logger: Logger) -> None:
        super().batch_end(state, logger)
        deviation = self.deviations[self.quantity]
        is_seen = torch.tensor(float(bool(deviation.first) and deviation.worst > SEEN))
        dist.all_reduce(is_seen, op=dist.ReduceOp.MAX)
        if is_seen:
            state.stop_training()


def _compare_faulty(topology: Topology, case: Case, seed: int, file: Path, name: str) -> dict[str, Deviation]:
    fault = FAULTS[name]
    return compare_case(topology, case, seed, file, fault.inject, partial(UntilSeen, fault.shows_in))


@pytest.fixture(scope="module")
def faulty_ranks() -> Iterator[CaseRanks]:
    with CaseRanks(_compare_faulty) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def sound_ranks() -> Iterator[CaseRanks]:
    with CaseRanks() as ranks:
        yield ranks


def test_ranks_import_nothing_that_takes_long(tmp_path: Path) -> None:
    """Whatever is imported only after the fork is imported again by each of hundreds of ranks."""
    case, file = find_case(load_recipe(YAMLS / "smoke.yaml"), Layout(1, 2, 1), "accumulated"), tmp_path / "r"
    make_reference(case, file)
    record = ReferenceRecord(**torch.load(file, weights_only=True))

    def work(topology: Topology) -> list[str]:
        before = set(sys.modules)
        train_case(case, topology, 0, Comparer(record, case, topology))
        return [name for name in sys.modules if name not in before]

    imported = run_ranks(2, work)[0]
    assert len(imported) < 30 and not [name for name in imported if "_dynamo" in name], imported


def _seen_in(fault: KnownFault) -> set[Precision]:
    """The precisions in which the gate must see a fault."""
    if next(each for each in INPUTS if each.name == fault.input).against_whole:
        return {Precision.fp32}
    return {fault.precision, Precision.bf16}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, precision)
        for name, fault in FAULTS.items()
        for precision in (Precision.fp32, Precision.bf16)
        if fault.shows_in and precision in _seen_in(fault)
    ],
)
def test_gate_sees_the_fault(name: str, precision: Precision, folder: Path, faulty_ranks: CaseRanks) -> None:
    fault = FAULTS[name]
    key = (fault.input, str(fault.layout), fault.experts, fault.optimizer, precision)
    case, seed, file = _reference(key, folder, fault.model, fault.qk_clip)
    outcome = CaseOutcome(case, faulty_ranks.run(case, seed, file, name))
    assert not outcome.has_passed
    deviation = outcome.deviations[fault.shows_in]
    assert deviation.first, f"not in {fault.shows_in}: {outcome.deviations}"
    assert deviation.worst > SEEN, "a fault is far above rounding"


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_recomputation_that_rounds_otherwise_is_seen_only_in_bf16(
    precision: Precision, folder: Path
) -> None:
    fault = FAULTS["rounded-in-forward-alone"]
    case, seed, file = _reference((fault.input, str(fault.layout), (), None, precision), folder)
    # From torch 2.13 on FSDP2 casts in recomputation too.
    if precision is Precision.fp32 or not TorchVersions((2, 7), before=(2, 13)).include(torch.__version__):
        assert CaseOutcome(case, run_case(case, seed, file, fault.inject)).has_passed
        return
    with pytest.raises(RankError, match="recomputed metadata"):
        run_case(case, seed, file, fault.inject)


def _average_over_own_targets(self: LanguageModel, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """The fault of gradient accumulation: a microbatch's loss is the mean over its own targets."""
    positions = outputs.loss_sum * (batch["targets"].numel() - len(batch["targets"]))
    return _loss(self, outputs._replace(loss_sum=positions / outputs.target_tokens.clamp(min=1)), batch)


_loss = LanguageModel.loss


def _noise_by_place(key: torch.Tensor, positions: torch.Tensor, *_: torch.Tensor | None) -> router.Jitter:
    return router.Jitter(key, torch.arange(len(positions)))


@pytest.mark.parametrize(
    ("target", "name", "fault"),
    [
        (LanguageModel, "loss", _average_over_own_targets),
        (microbatch, "Jitter", _noise_by_place),
    ],
)
def test_what_depends_on_the_split_is_seen_though_the_reference_does_too(
    target: Any, name: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the source, which is that of the reference too."""
    recipe = load_recipe(YAMLS / "smoke.yaml", ["model.moe.jitter_eps=0.05"])
    layout = Layout(1, 2, 1)
    for is_faulty in (False, True):
        if is_faulty:
            monkeypatch.setattr(target, name, fault)
        case, file = find_case(recipe, layout, "split"), tmp_path / "reference.pt"
        outcome = CaseOutcome(case, run_case(case, make_reference(case, file), file))
        assert outcome.has_passed != is_faulty, outcome.deviations


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize(
    ("layout", "experts", "optimizer"),
    [
        ("(2,1,2)", (), None),
        ("(1,1,2)", (), None),
        ("(1,1,2)", FINER, None),
        ("(1,2,1)", GLOBAL_SCOPE, None),
        ("(1,1,2)", (), OptimizerKind.muon),
        ("(1,2,1)c2", (), None),
        ("(1,2,1)t2", (), None),
        ("(1,1,1)p2", (), None),
    ],
)
def test_gate_passes_the_same_cases_without_a_fault(
    layout: str,
    experts: Changes,
    optimizer: OptimizerKind | None,
    precision: Precision,
    folder: Path,
    sound_ranks: CaseRanks,
) -> None:
    case, seed, file = _reference(("accumulated", layout, experts, optimizer, precision), folder)
    outcome = CaseOutcome(case, sound_ranks.run(case, seed, file))
    assert outcome.has_passed, outcome.deviations


@pytest.mark.parametrize(
    ("layout", "precision", "scope"),
    [
        (Layout(1, 1, 2, context=2), Precision.fp32, "sequence"),
        (Layout(1, 1, 2, tensor=2), Precision.bf16, "microbatch"),
    ],
)
def test_gate_passes_halves_of_shared_sequences(
    layout: Layout, precision: Precision, scope: str, tmp_path: Path
) -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml", [*HALVED.split(), f"model.moe.balance_scope={scope}"])
    case, file = find_case(recipe, layout, "accumulated", precision), tmp_path / "reference.pt"
    assert case.recipe.parallelism.interleave and case.recipe.training.microbatch_sequences == 2
    outcome = CaseOutcome(case, run_case(case, make_reference(case, file), file))
    assert outcome.has_passed, outcome.deviations


def test_a_near_zero_update_of_lion_that_rounding_turns_accuses_nobody(tmp_path: Path) -> None:
    """AdamW's recipe, whose other optimizer is Lion, with noise that makes such an update."""
    recipe = load_recipe(YAMLS / "smoke.yaml", ["model.moe.jitter_eps=0.05"])
    case, file = find_case(recipe, Layout(1, 2, 1), "recomputed"), tmp_path / "reference.pt"
    outcome = CaseOutcome(case, run_case(case, make_reference(case, file), file))
    assert outcome.has_passed, outcome.deviations


@pytest.mark.parametrize(
    ("stem", "overrides", "input_", "precision", "named"),
    [
        ("smoke", "", "idle", Precision.fp32, "(1,2,1) (1,1,2) (2,1,1) (1,2,1)t2 (1,1,4)n2"),
        ("smoke", "", "crowded", Precision.fp32, "(1,1,2) (1,2,1)c2 (1,1,4)n2"),
        ("smoke", TRADED, "accumulated", Precision.bf16, "(2,2,1) (2,1,2) (2,1,2)c4 (1,1,4)t2 (1,1,2)p2"),
        ("smoke", "model.mtp=true", "idle", Precision.bf16, "(1,1,4)t2 (1,1,1)p2"),
        ("smoke", "model.mtp=true", "accumulated", Precision.bf16, "(1,1,2)t2p2"),
        ("smoke", "", "loaded", Precision.fp32, "(1,1,2)t2p2"),
        # Only ranks with whole experts halve their microbatches.
        ("smoke", f"{HALVED} model.moe.jitter_eps=0.05", "split", Precision.fp32, "(1,1,2) (1,2,1)t2"),
        ("smoke", f"{HALVED} model.mtp=true", "recomputed", Precision.fp32, "(1,2,1) (1,1,2) (1,1,4)n2"),
        ("smoke", HALVED, "plain", Precision.bf16, "(1,1,2)"),
        # Two phases: sequences grow after the first step.
        ("dbrx", "", "accumulated", Precision.fp32, "(1,1,2)"),
        ("dbrx", "", "loaded", Precision.fp32, "(1,2,2) (2,1,2)c4 (1,1,4)t2"),
        ("smoke", f"{GLOBAL} model.moe.jitter_eps=0.1", "plain", Precision.fp32, "(1,1,2)"),
        (
            "smoke",
            f"{GLOBAL} model.moe.jitter_eps=0.1",
            "recomputed",
            Precision.fp32,
            "(1,2,1) (1,1,2) (1,2,1)c2 (1,2,1)t2",
        ),
        ("smoke", f"{SCOPE}=rank", "accumulated", Precision.fp32, "(1,2,1) (1,1,2) (1,2,1)c2"),
        # Without such a group the scope is the microbatch.
        ("smoke", f"{SCOPE}=expert_group", "accumulated", Precision.fp32, "(1,1,2) (1,2,1)t2"),
        ("smoke", "model.moe.balance=bias", "accumulated", Precision.bf16, "(1,2,1) (1,1,2)"),
        # Latent attention, whose heads are made again.
        ("deepseek-v3", "", "idle", Precision.fp32, "(1,2,1) (1,1,2) (1,1,4)n2"),
        ("deepseek-v3", "optimizer.qk_clip=9", "recomputed", Precision.fp32, "(1,1,2)p2"),
        ("smoke", "model.mtp=true", "recomputed", Precision.fp32, "(1,1,2)p2 (1,1,1)p4"),
        ("smoke", "model.tie_embeddings=true", "accumulated", Precision.bf16, "(1,2,1)p2"),
        ("qwen3-30b-a3b", "", "recomputed", Precision.fp32, "(1,1,2) (1,2,1)t2"),
        ("olmoe-1b-7b", "", "split", Precision.fp32, "(1,1,2) (1,2,1)c2"),
        ("finegrain-132b", "", "recomputed", Precision.fp32, "(1,1,2) (1,2,1)c2"),
    ],
)
def test_gate_passes_a_recipe_under_the_layouts_that_differ_in_it(
    stem: str,
    overrides: str,
    input_: str,
    precision: Precision,
    named: str,
    tmp_path: Path,
    sound_ranks: CaseRanks,
) -> None:
    """The command, below, takes every layout."""
    recipe, names = load_recipe(YAMLS / f"{stem}.yaml", overrides.split()), named.split()
    found = [case for case in cases(recipe, (2, 4), (input_,), precision) if str(case.layout) in names]
    assert len(found) == len(names), "the recipe does not allow one"
    file, made = tmp_path / "reference.pt", None
    for case in found:
        if made is None or reference_of(case) != made:
            seed, made = make_reference(case, file), reference_of(case)
        outcome = CaseOutcome(case, sound_ranks.run(case, seed, file))
        assert outcome.has_passed, (str(case.layout), outcome.deviations)


@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("smoke", "--precision fp32 --worlds 4 --inputs accumulated"),
        ("dbrx-moe-a", "--worlds 2 --inputs recomputed"),
    ],
)
def test_command_passes_a_recipe_and_writes_its_tables(
    stem: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, figures = tmp_path / "parity.html", tmp_path / "parity.json"
    written = ["--html", str(page), "--json", str(figures)]
    assert main([str(YAMLS / f"{stem}.yaml"), *options.split(), *written]) == 0, capsys.readouterr().err
    report = json.loads(figures.read_text())
    assert report["passed"] and not report["first_difference"]
    for case in report["cases"]:
        errors = case["largest_relative_error"]
        assert all(
            errors[quantity] <= bound for quantity, bound in report["bounds"][case["precision"]].items()
        ), case
        assert case["layout"] in page.read_text()


def test_a_failure_has_status_1_and_names_what_differs_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "parity.html"
    recipe = str(YAMLS / "smoke.yaml")
    assert main([recipe, "--inject", "experts-over-degree", "--html", str(page)]) == 1
    complaint = capsys.readouterr().err
    assert "step 1" in complaint and ".experts." in complaint and "expert 0" in complaint
    assert "0 of 1 cases passed" in page.read_text()


def test_an_error_in_the_recipe_has_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(YAMLS / "smoke.yaml"), "model.moe.top_k=99"]) == 2
    assert "top_k" in capsys.readouterr().err


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("key", ["training.expert_precision=fp8", "model.moe.balance_scope=expert_group"])
def test_every_case_reads_each_sequence_once(key: str, precision: Precision) -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml", [key])
    found = [case for case in cases(recipe, precision=precision) if not case.input.loaded]
    assert {"c2", "c4", "t2"} <= {str(case.layout)[-2:] for case in found}
    for case in found:
        assert sorted(case.rows) == list(range(SEQUENCES)), case
        microbatches, left = divmod(SEQUENCES, case.reference_microbatch * case.balance_microbatches)
        assert microbatches and not left, case


def test_layouts_are_all_that_the_recipe_allows() -> None:
    recipe = load_recipe(YAMLS / "smoke.yaml")
    found = {str(layout) for layout in layouts(recipe)}
    assert found >= {"(1,1,1)", "(1,2,1)", "(1,1,2)", "(2,1,1)", "(1,4,1)", "(1,2,2)", "(1,1,4)", "(2,1,2)"}
    assert len(found) == len(layouts(recipe)) == 9
    assert Layout(1, 1, 8) in layouts(recipe, worlds=(8,)), "experts over all ranks there are"
    dense = load_recipe(YAMLS / "mpt-7b.yaml")
    assert all(layout.expert == 1 for layout in layouts(dense))
    for layout in layouts(recipe, worlds=(4,)):
        case = find_case(recipe, layout, "accumulated")
        validate(case.recipe, Topology(0, layout.world_size, 0, 1), "smoke")


@pytest.mark.parametrize(
    ("stem", "options", "key", "what"),
    [
        ("smoke", {"inputs": ["plane"]}, "--inputs", "one of plain"),
        ("smoke", {"inject": "nonsense"}, "--inject", "one of experts-times-degree"),
        ("smoke", {"worlds": [3]}, "--worlds", "3 ranks cannot share"),
        ("smoke", {"worlds": [1], "precisions": [Precision.bf16]}, "--worlds", "no case"),
        ("mpt-7b", {"inputs": ["crowded"]}, "--inputs", "no case"),
        ("mpt-7b", {"inject": "experts-swapped"}, "--inject", "dense"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    stem: str, options: dict[str, Any], key: str, what: str
) -> None:
    with pytest.raises(UserError) as refused:
        ParityCheck(load_recipe(YAMLS / f"{stem}.yaml"), **options)
    assert key in refused.value.key and what in str(refused.value)
