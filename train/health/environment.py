"""Environment of every rank: NCCL, InfiniBand, memory and threads, with the reason for each.

Jobs of `launch.submit` get it from their launcher. For every other start, for example `composer -n 8
train/main.py`, :func:`set_defaults` does the same within the process.

Meanings are those of NCCL's user guide (Environment Variables) and of torch's documentation of
ProcessGroupNCCL, of the caching allocator and of Inductor. Variables not listed here keep their defaults.
"""

import faulthandler
import getpass
import os
import sys
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from train.recipe.topology import Topology, usable_cores


@dataclass(frozen=True)
class Variable:
    """An environment variable of every rank."""

    name: str
    value: str
    reason: str
    device: str | None = "cuda"
    """The device of the ranks that get it, as torch spells it; None: any."""


TABLE = (
    Variable("NCCL_DEBUG", "WARN", "NCCL says which peer and which card failed; silent while nothing does"),
    Variable(
        "NCCL_IB_TIMEOUT",
        "22",
        "4.1 us x 2^22 = 17 s per try: a link that comes up again does not end a job of thousands",
    ),
    Variable("NCCL_IB_RETRY_CNT", "7", "tries before a link counts as lost: with the time-out, two minutes"),
    Variable(
        "NCCL_CROSS_NIC",
        "0",
        "a ring stays on one rail: GPU i talks to GPU i of other nodes through the same leaf switch",
    ),
    Variable(
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "2000",
        "flight recorder: the last collectives of each rank, which the watchdog reads when a rank hangs",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "dropless experts get another number of rows each step, which splinters fixed segments",
    ),
    Variable(
        "CUBLAS_WORKSPACE_CONFIG",
        ":4096:8",
        "cuBLAS adds in a fixed order also where streams run side by side; 24 MB a handle",
    ),
    Variable("TORCHINDUCTOR_COMPILE_THREADS", "4", "8 ranks with the 32 of the default are 256 compilers"),
    Variable(
        "OMP_NUM_THREADS", "8", "8 ranks x 8 threads on a node of 96 cores or more leaves room for loaders"
    ),
    Variable("OMP_NUM_THREADS", "1", "ranks on CPUs share the cores", "cpu"),
    Variable("PYTHONUNBUFFERED", "1", "the last line before a crash is in the log", None),
    Variable("PYTHONFAULTHANDLER", "1", "a crash in C prints the Python stack of each thread", None),
    Variable("HF_HUB_OFFLINE", "1", "thousands of ranks never ask a hub at once; all files are local", None),
)

NVIDIA = Path("/proc/driver/nvidia")
"""Exists where NVIDIA's driver is loaded; asking torch would take seconds, and too late."""


def set_defaults(
    topology: Topology, variables: MutableMapping[str, str] | None = None, *, has_gpu: bool | None = None
) -> None:
    """Sets what is not set yet; to be called before torch is imported, which reads some of it only then.

    Args:
        topology: this rank.
        variables: the environment to change (default: the process's own).
        has_gpu: whether ranks run on GPUs (default: whether NVIDIA's driver is loaded).
    """
    variables = os.environ if variables is None else variables
    has_gpu = NVIDIA.exists() if has_gpu is None else has_gpu
    found = {v.name: v.value for v in TABLE if v.device in (None, "cuda" if has_gpu else "cpu")}
    if topology.world_size == 1:
        del found["HF_HUB_OFFLINE"]
    if not has_gpu and topology.local_world_size == 1:
        del found["OMP_NUM_THREADS"]  # One process has all cores to itself.
    elif has_gpu:
        cores = usable_cores() // topology.local_world_size
        found["OMP_NUM_THREADS"] = str(max(1, min(cores, int(found["OMP_NUM_THREADS"]))))
        # Triton's own default is in the home folder, which all nodes share on most clusters.
        cache = Path(tempfile.gettempdir()) / f"finegrain-{getpass.getuser()}" / "triton"
        found["TRITON_CACHE_DIR"] = str(cache)
    for name, value in found.items():
        variables.setdefault(name, value)
    # Python has read these two already.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
