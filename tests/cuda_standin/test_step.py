"""Optimizer steps of a tiny MoE-A on the stand-in: what the host and the device are asked to do, by layer."""

import functools
import json
import re
from typing import Any

import pytest

from tests.cuda_standin import standin
from train.model.experts import HAS_GROUPED_MM

pytestmark = pytest.mark.slow

D, F, E, K, TOKENS, V = 256, 448, 16, 4, 1024, 4096
TINY = [
    "yamls/dbrx-moe-a.yaml",
    f"model.d_model={D}",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    f"model.ffn_hidden_size={F}",
    f"model.vocab_size={V}",
    "tokenizer.kind=bpe",
    f"tokenizer.vocab_size={V}",
    "model.max_sequence_tokens=512",
    "data.sequence_tokens=512",
    f"training.microbatch_sequences={TOKENS // 512}",
]
KEPT, RECOMPUTED = "training.recompute=nothing", "training.recompute=layer"
CASES = {
    (layers, recomputed): [*TINY, f"model.n_layers={layers}", RECOMPUTED if recomputed else KEPT]
    for layers in (2, 4)
    for recomputed in (False, True)
}
FROZEN = [*TINY, "model.n_layers=2", KEPT, "training.frozen=['*.experts.*']"]
COMPILED = [*TINY, "model.n_layers=2", KEPT, "training.compile=blocks"]
Step = dict[str, Any]


@pytest.fixture(scope="module")
def taken() -> list[Step]:
    found: list[Step] = standin.run("step", json.dumps([*CASES.values(), FROZEN]))
    return found


@pytest.fixture(scope="module")
def steps(taken: list[Step]) -> dict[tuple[int, bool], Step]:
    return dict(zip(CASES, taken, strict=False))


def calls(step: Step, group: str) -> int:
    return sum(count[0] for count in step["counts"].get(group, {}).values())


def is_grouped(kernel: str) -> bool:
    """Returns whether a kernel is a grouped product."""
    return re.search("cutlass.*GroupProblemShape", kernel) is not None and "prepare_grouped" not in kernel


def by_layer(steps: dict[tuple[int, bool], Step], recomputed: bool, group: str) -> float:
    return (calls(steps[4, recomputed], group) - calls(steps[2, recomputed], group)) / 2


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_host_waits_twice_a_step_and_in_no_layer(
    steps: dict[tuple[int, bool], Step], recomputed: bool
) -> None:
    """Without grouped_mm (torch before 2.10) it also waits for the experts' counts, once a layer."""
    per_layer = 0 if HAS_GROUPED_MM else 1
    expected = {"train/layout/optim.py: clip_gradients": 1}
    if steps[2, recomputed]["has_varlen"]:
        expected["train/model/attention.py: document_offsets"] = 1
    for layers in (2, 4):
        found = dict(steps[layers, recomputed]["waits"])
        assert found.pop("train/model/experts.py: grouped_glu", 0) == per_layer * layers
        assert found == expected
        assert calls(steps[layers, recomputed], "waits") == sum(expected.values()) + per_layer * layers


def test_the_cpu_only_finds_where_documents_and_experts_begin(steps: dict[tuple[int, bool], Step]) -> None:
    allowed = {"train/model/attention.py: document_offsets"}
    if not HAS_GROUPED_MM:
        allowed.add("train/model/experts.py: grouped_glu")
    for step in steps.values():
        assert set(step["on_cpu"]) <= allowed


@pytest.mark.parametrize("recomputed", [False, True])
def test_matrices_are_copied_only_where_precision_changes(
    steps: dict[tuple[int, bool], Step], recomputed: bool
) -> None:
    """Three matrices of experts a layer, cast once per forward pass, and their gradients back."""
    found = steps[4, recomputed]["large_copies"]
    ours = "train/model/experts.py: _GroupedGlu."
    assert found.pop(f"{ours}forward _to_copy float32 to bfloat16") == 3 * 4 * (1 + recomputed)
    assert found.pop(f"{ours}backward _to_copy bfloat16 to float32") == 3 * 4
    assert not found


@pytest.mark.parametrize("recomputed", [False, True])
def test_products_of_a_layer_are_those_of_its_parts(
    steps: dict[tuple[int, bool], Step], recomputed: bool
) -> None:
    """The FLOPs by precision: a product has two for its gradients, and another where it is recomputed."""
    found = {"bf16": 0.0, "fp32": 0.0}
    for layers, sign in ((4, 1), (2, -1)):
        for name, (_, flops, _) in steps[layers, recomputed]["counts"]["products"].items():
            found[name.split()[0]] += sign * flops / 2
    passes = 3 + recomputed
    attention = passes * 2 * TOKENS * D * (2 * D + D)  # Wqkv, and the output
    experts = 0 if HAS_GROUPED_MM else passes * 3 * 2 * TOKENS * K * D * F
    assert found == {"bf16": attention + experts, "fp32": passes * 2 * TOKENS * D * E}


def test_experts_are_grouped_kernels(steps: dict[tuple[int, bool], Step]) -> None:
    """Three products of a layer, each with two for its gradients."""
    if not HAS_GROUPED_MM:
        pytest.skip("this torch has no grouped_mm, which came with 2.10")
    grouped = [
        sum(count[0] for name, count in steps[layers, False]["counts"]["kernels"].items() if is_grouped(name))
        for layers in (2, 4)
    ]
    assert grouped == [9 * 2, 9 * 4]


@pytest.mark.parametrize(("group", "most"), [("kernels", 200), ("copies", 20)])
def test_a_layer_asks_for_no_more_than_it_did(
    steps: dict[tuple[int, bool], Step], group: str, most: int
) -> None:
    assert 0 < by_layer(steps, False, group) <= most


def test_frozen_experts_have_no_gradients_to_compute(
    steps: dict[tuple[int, bool], Step], taken: list[Step]
) -> None:
    """The three products of a layer for its experts' weights are not asked for; the rest is."""
    group = "kernels" if HAS_GROUPED_MM else "products"

    def products(step: Step) -> int:
        names = step["counts"][group].items()
        return sum(count[0] for name, count in names if not HAS_GROUPED_MM or is_grouped(name))

    per_layer = 3 if HAS_GROUPED_MM else 3 * E
    assert products(steps[2, False]) - products(taken[-1]) == 2 * per_layer
    assert not any("_to_copy bfloat16 to float32" in place for place in taken[-1]["large_copies"])


@functools.cache
def taken_with_flex(major: int) -> list[Step]:
    """Steps whose documents go through FlexAttention; for Hopper also one of compiled layers."""
    cases = [CASES[2, False], *([COMPILED] if major == 9 and HAS_GROUPED_MM else [])]
    found: list[Step] = standin.run("step", json.dumps(cases), MAJOR=str(major), FLEX="1")
    return found


@pytest.mark.parametrize("major", [9, 10])
def test_kernels_are_compiled_for_hopper_and_blackwell(major: int) -> None:
    """By ptxas, to machine code of that architecture: MegaBlocks' kernels, the loss's, FlexAttention's."""
    found = taken_with_flex(major)[0]
    assert set(found["modules"]) == {f"sm_{major}0"}
    kernels = set(found["counts"]["triton"])
    assert {"_padded_copy", "_padded_copy_wgrad", "cross_entropy"} <= kernels
    assert any(name.startswith("triton_tem_") for name in kernels)  # FlexAttention's, from a template


def test_compiled_layers_are_one_graph_of_kernels_for_hopper() -> None:
    """`training.compile=blocks`: Inductor's kernels for torch's, no break, one compilation for all layers."""
    if not HAS_GROUPED_MM:
        pytest.skip("torch before 2.10 has no grouped product: `training.compile` is refused")
    plain, compiled = taken_with_flex(9)
    assert compiled["graphs"] == 1 and not compiled["breaks"]
    assert set(compiled["modules"]) == {"sm_90"}
    kernels = set(compiled["counts"]["triton"])
    assert {"_padded_copy", "_padded_copy_wgrad", "cross_entropy"} <= kernels
    assert any(name.startswith("triton_tem_") for name in kernels)
    assert any(re.match("triton_(poi|red|per)_fused", name) for name in kernels)
    assert calls(compiled, "kernels") < calls(plain, "kernels")
    assert sum(compiled["waits"].values()) <= sum(plain["waits"].values())
