"""A stand-in Triton driver for machines without a GPU, since importing MegaBlocks' kernels needs one."""

import importlib
import time
from collections.abc import Callable
from typing import Any


class _NoGpu:
    """The part of a driver that Triton's autotuner calls."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Returns a wall clock in milliseconds, by which the interpreter's kernels are tuned."""

        def milliseconds(call: Callable[[], Any], quantiles: list[float], **_: Any) -> list[float]:
            start = time.perf_counter()
            call()
            return [(time.perf_counter() - start) * 1e3] * len(quantiles)

        return milliseconds


def give_triton_a_driver() -> None:
    """Sets the stand-in driver if Triton finds none; a GPU's driver is kept."""
    driver = importlib.import_module("triton.runtime.driver").driver
    try:
        driver.active.get_benchmarker()
    except RuntimeError:  # "0 active drivers": no GPU here
        driver.set_active(_NoGpu())
