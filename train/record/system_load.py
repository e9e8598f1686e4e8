"""Memory of the GPU and the host at every step; power and temperature of the GPU every few seconds."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from train.record import metrics

SENSOR_SECONDS = 10.0
"""Seconds between readings of the GPU's sensors, which take its driver milliseconds."""


class SystemLoad(Callback):
    """Logs ``system/...``: figures of rank 0's GPU, of its process and of its node; for rank 0 only.

    The peak is that of the step: the allocator's counter is set back when a batch starts. Power and
    temperature come from NVIDIA's management library through torch, if it is installed.

    Args:
        on_gpu: whether the model runs on a GPU (not yet run on a GPU; counted on the stand-in).
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = self._has_sensors = on_gpu
        self._read_at = -SENSOR_SECONDS

    def batch_start(self, state: State, logger: Logger) -> None:
        """Sets the peak back, so that evaluation and saves between steps do not count."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs the step's figures."""
        figures = {metrics.PROCESS_MEMORY: process_bytes(), metrics.HOST_MEMORY: host_bytes()}
        if self.on_gpu:
            figures[metrics.GPU_MEMORY_PEAK] = torch.cuda.max_memory_allocated()
            figures[metrics.GPU_MEMORY_RESERVED] = torch.cuda.max_memory_reserved()
            figures |= self._sensors()
        logger.log_metrics(figures)

    def _sensors(self) -> dict[str, float]:
        if not self._has_sensors or time.monotonic() - self._read_at < SENSOR_SECONDS:
            return {}
        self._read_at = time.monotonic()
        try:
            power_milliwatts, temperature = torch.cuda.power_draw(), torch.cuda.temperature()
        except (
            Exception
        ):  # No library, no permission, or a card without sensors: each has an error of its own.
            self._has_sensors = False
            return {}
        return {metrics.GPU_POWER: power_milliwatts / 1e3, metrics.GPU_TEMPERATURE: temperature}


def process_bytes() -> float:
    """Returns the resident memory of this process; NaN where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    return float("nan")


def host_bytes() -> float:
    """Returns the memory of this node that is in use, caches left out; NaN where the system does not say."""
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
        return 1024.0 * (kilobytes["MemTotal"] - kilobytes["MemAvailable"])
    return float("nan")
