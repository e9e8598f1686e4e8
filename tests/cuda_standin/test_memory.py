"""The planner's memory against PyTorch's allocator at full size, as rank 0 of the job; the host's waits."""

from pathlib import Path
from typing import Any

import pytest

from launch.gpu_check.step import slice_of
from launch.plan.memory import memory
from tests.cuda_standin import standin
from train.model.experts import HAS_GROUPED_MM
from train.recipe.reading import load_recipe

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
H100_BYTES = 84943110144
OF_32K = [
    "data.sequence_tokens=32768",
    "training.global_batch_sequences=3072",
    "training.microbatch_sequences=1",
    "training.recompute=layer",
]


def of_slice() -> list[str]:
    """Returns the overrides with which gpu-check measures MoE-A on an H100."""
    found = slice_of(load_recipe(YAMLS / "dbrx-moe-a.yaml"), H100_BYTES)
    sequences = found.training.microbatch_sequences
    return [
        f"model.n_layers={found.model.n_layers}",
        f"training.microbatch_sequences={sequences}",
        f"training.global_batch_sequences={sequences}",
    ]


Case = tuple[str, int, list[str]]
CASES: dict[str, Case] = {
    "MoE-A, gpu-check's slice, 1 GPU": ("dbrx-moe-a", 1, of_slice()),
    "MoE-A, 64 GPUs": ("dbrx-moe-a", 64, []),
    "MoE-A, 64 GPUs, gates": ("dbrx-moe-a", 64, ["training.recompute=gates"]),
    "DBRX, 3,072 GPUs": ("dbrx", 3072, []),
    "DBRX, 3,072 GPUs, interleaved": (
        "dbrx",
        3072,
        ["parallelism.expert=16", "parallelism.interleave=true"],
    ),
    "DBRX, 3,072 GPUs, 32k": ("dbrx", 3072, OF_32K),
    "DBRX, 64 GPUs, 32k, shared by 8": (
        "dbrx",
        64,
        [
            *OF_32K,
            "training.global_batch_sequences=8",
            "parallelism.replicate=1",
            "parallelism.expert=8",
            "parallelism.context=8",
        ],
    ),
    "DBRX, 64 GPUs, 32k, split by 8": (
        "dbrx",
        64,
        [
            *OF_32K,
            "training.global_batch_sequences=8",
            "parallelism.replicate=1",
            "parallelism.expert=8",
            "parallelism.tensor=8",
        ],
    ),
    "DBRX, 64 GPUs, 32k, inputs in host memory": (
        "dbrx",
        64,
        [
            *OF_32K,
            "training.global_batch_sequences=64",
            "parallelism.replicate=1",
            "parallelism.expert=8",
            "training.offload=true",
        ],
    ),
}


def measured(case: Case) -> Any:
    """Runs a case on the stand-in."""
    stem, ranks, overrides = case
    return standin.run("world", str(ranks), str(YAMLS / f"{stem}.yaml"), *overrides, ALONE="1")


def planned_bytes(case: Case) -> int:
    """Returns what the plan says that the allocator hands out: its margins are not of that."""
    stem, ranks, overrides = case
    plan = memory(load_recipe(YAMLS / f"{stem}.yaml", overrides), ranks)
    return plan.total - plan.fragmentation - plan.reserved


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_planned_memory_is_within_a_twentieth_of_the_allocators_peak(case: Case) -> None:
    if not HAS_GROUPED_MM:
        pytest.skip("the plan is of the kernels of today's torch")
    stem, _, overrides = case
    recipe, found = load_recipe(YAMLS / f"{stem}.yaml", overrides), measured(case)
    assert planned_bytes(case) == pytest.approx(found["peak"], rel=0.05)
    # At most the documents' places, at each pass, and the norm. An exchange needs counts, once.
    halves = 2 if recipe.parallelism.interleave else 1
    exchanged = halves * recipe.model.n_layers if recipe.parallelism.expert > 1 else 0
    assert found["waits"].pop("train/model/exchange.py: RowCounts.on_host", 0) == exchanged
    assert sum(found["waits"].values()) <= 3


@pytest.mark.parametrize(("grade", "interleave"), [("ffn", "false"), ("layer", "true")])
def test_the_host_waits_for_counts_once_though_the_exchange_is_repeated(grade: str, interleave: str) -> None:
    keys = ["model.n_layers=2", f"training.recompute={grade}", f"parallelism.interleave={interleave}"]
    found = measured(("dbrx", 3072, ["parallelism.expert=8", *keys]))
    halves = 2 if interleave == "true" else 1
    assert found["waits"]["train/model/exchange.py: RowCounts.on_host"] == 2 * halves
    # Counts once; rows to experts and back, in the forward pass, its repetition and the backward pass. Newer
    # NCCLs have an all-to-all of equal parts.
    calls = {name: of_name[0] for name, of_name in found["counts"]["collectives"].items()}
    assert calls["send over 8"] + 8 * calls.get("all-to-all over 8", 0) == 2 * halves * (1 + 6) * 8


def test_tokens_that_cross_once_per_node_take_what_the_plan_says() -> None:
    """The host waits once a layer; rows go to two nodes and to eight ranks, there and back, in each pass."""
    if not HAS_GROUPED_MM:
        pytest.skip("the plan is of the kernels of today's torch")
    keys = ["parallelism.expert=16", "parallelism.exchange_node_ranks=8"]
    case = ("dbrx", 3072, ["model.n_layers=4", "training.recompute=gates", *keys])
    found = measured(case)
    assert planned_bytes(case) == pytest.approx(found["peak"], rel=0.05)
    assert found["waits"].pop("train/model/node_exchange.py: NodeCounts.on_host") == 4
    assert sum(found["waits"].values()) <= 3
    calls = {name: of_name[0] for name, of_name in found["counts"]["collectives"].items()}
    across, within = (
        calls[f"send over {ranks}"] / ranks + calls.get(f"all-to-all over {ranks}", 0) for ranks in (2, 8)
    )
    # Rows four times, across with their labels twice; counts once.
    assert (across, within) == (4 * (4 + 2 + 1), 4 * (4 + 1))


def test_layers_that_stay_gathered_take_what_the_plan_says() -> None:
    """The difference only: of few layers the whole plan is 8% above the allocator."""
    if not HAS_GROUPED_MM:
        pytest.skip("the plan is of the kernels of today's torch")
    freed, kept = (
        ("dbrx-moe-a", 64, ["model.n_layers=8", f"parallelism.gathered_layers={layers}"]) for layers in (0, 4)
    )
    planned = planned_bytes(kept) - planned_bytes(freed)
    assert planned == pytest.approx(measured(kept)["peak"] - measured(freed)["peak"], rel=0.05)
