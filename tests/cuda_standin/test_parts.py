"""Parts of a step on the stand-in: the kernels that they ask for, what they hold, and a hang's report."""

from pathlib import Path
from typing import Any

import pytest

from tests.cuda_standin import standin
from train.health.heartbeat import FINDING_FILE, Finding, read_record
from train.model.experts import HAS_GROUPED_MM
from train.model.loss import HAS_MIXED_PRODUCTS
from train.recipe.exit_status import HANG_STATUS

pytestmark = pytest.mark.slow

D, V, CHUNK, ELEMENTS = 256, 4096, 128, 1 << 20
BF16, FP32 = 2, 4
WORKSPACE = 4096 << 13
"""Bytes that cuBLAS takes for a product, by CUBLAS_WORKSPACE_CONFIG."""
Part = dict[str, Any]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def parts(records: Path) -> dict[str, Any]:
    found: dict[str, Any] = standin.run("parts", str(records), ALONE="1")
    return found


def calls(part: Part, group: str) -> dict[str, int]:
    return {name: count[0] for name, count in part.get(group, {}).items()}


def test_a_norm_is_one_kernel_that_reads_and_writes_bf16(parts: dict[str, Any]) -> None:
    assert sum(calls(parts["norm layernorm"], "kernels").values()) == 1
    if HAS_GROUPED_MM:  # torch 2.7 has no kernel for RMSNorm.
        assert sum(calls(parts["norm rmsnorm"], "kernels").values()) == 1


@pytest.mark.parametrize("part", ["attention", "attention, documents"])
def test_flash_attention_reads_grouped_heads_as_they_are(parts: dict[str, Any], part: str) -> None:
    documents = "documents" in part
    if not documents or not calls(parts[part], "triton"):  # else FlexAttention's
        assert any("flash_fwd" in name for name in calls(parts[part], "kernels"))
    # With as many key and value heads as queries there is nothing to repeat: no kernel more, and none less.
    for group in ("kernels", "triton", "copies"):
        assert calls(parts[part], group) == calls(parts[f"{part}, not grouped"], group)


def test_a_chunk_of_the_loss_is_three_products_and_a_kernel(parts: dict[str, Any]) -> None:
    two, six = (parts[f"loss of {chunks} chunks"] for chunks in (2, 6))

    def by_chunk(group: str) -> float:
        return (sum(calls(six, group).values()) - sum(calls(two, group).values())) / 4

    assert by_chunk("products") == 3 and by_chunk("triton") == 1
    # Before torch 2.8 a product is added to the total in a pass of its own.
    assert by_chunk("kernels") + by_chunk("copies") <= (1 if HAS_MIXED_PRODUCTS else 2)
    held = 2 * CHUNK * D * BF16 + V * D * FP32 + CHUNK * V * BF16
    casts = V * D * BF16  # of the gradient, which autograd returns in the weight's precision
    assert two["peak"] <= max(held + casts, held + WORKSPACE) + (1 << 16)


def test_inputs_come_back_from_host_memory_as_they_were(parts: dict[str, Any]) -> None:
    assert parts["offload"]["wrong"] == 0
    # The leaf, two inputs, a third until the newest is saved, and its output; all six would be eight.
    assert parts["offload"]["peak"] <= 5 * ELEMENTS * FP32 + (1 << 16)


def test_recording_collectives_on_nccl_holds_no_memory(parts: dict[str, Any]) -> None:
    held = parts["held"]
    assert held["of a run"] == held["none"]
    # The recorder of gloo would keep their handles, and those their tensors.
    assert held["of gloo"] > held["none"] + 4 * ELEMENTS * FP32


def test_a_hang_on_nccl_says_what_the_flight_recorder_shows(parts: dict[str, Any], records: Path) -> None:
    assert parts["ended"] == [HANG_STATUS]
    finding = read_record(records / FINDING_FILE, Finding)
    assert finding is not None and finding.waiting == [0]
    assert [suspect.rank for suspect in finding.suspects] == [1]
    (line,) = finding.recorded
    assert "all_reduce of 4,194,304 bytes" in line and "not issued by 1 (last: unknown)" in line
    assert (records / "nccl-00000.json").is_file()
