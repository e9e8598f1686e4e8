"""Experts in block-scaled fp8 on the stand-in: torch takes their operands, and asks for the right kernels."""

from typing import Any

import pytest

from tests.cuda_standin import standin
from train.model.experts import HAS_GROUPED_MM

pytestmark = pytest.mark.slow

SIZES = (40, 0, 129, 1)
PRODUCTS = 9
"""Three forward, and two for the gradients of each."""


def scaled(precision: str, major: int) -> dict[str, Any]:
    shapes = [str(size) for size in (256, 384, *SIZES)]
    found: dict[str, Any] = standin.run("scaled", precision, *shapes, MAJOR=str(major))
    return found


def test_blocks_of_128_are_products_of_each_expert_on_hopper() -> None:
    found = scaled("fp8", 9)
    if not HAS_GROUPED_MM:
        assert "does not have; install a newer torch, or set it to same" in found["refusals"]["fp8"]
        return
    assert found["refusals"] == {"same": "", "fp8": "", "mxfp8": found["refusals"]["mxfp8"]}
    assert "has compute capability 9.0; set it to fp8" in found["refusals"]["mxfp8"]
    busy = sum(size > 0 for size in SIZES)
    assert found["ran"] == {"scaled_mm": PRODUCTS * busy, "idle": PRODUCTS * (len(SIZES) - busy)}
    assert sum(count[0] for count in found["counts"]["products"].values()) == PRODUCTS * busy
    assert not found["waits"]


def test_tiles_of_32_are_grouped_products_on_blackwell() -> None:
    found = scaled("mxfp8", 10)
    if not HAS_GROUPED_MM:
        assert "does not have; install a newer torch, or set it to same" in found["refusals"]["mxfp8"]
        return
    assert "has compute capability 10.0; set it to mxfp8" in found["refusals"]["fp8"]
    assert found["ran"] == {"scaled_grouped_mm": PRODUCTS}
    kernels = found["counts"]["kernels"]
    grouped = [count[0] for name, count in kernels.items() if "MMA_MXF8F6F4" in name and "ue8m0" in name]
    assert sum(grouped) == PRODUCTS and "products" not in found["counts"]
    assert not found["waits"]
