"""Builds the stand-in for CUDA, cuBLAS and NCCL, and runs processes on it.

The library (`*.cpp` here) is preloaded, so that PyTorch's own CUDA build runs on a machine without a GPU:
its dispatcher, allocator, autograd, streams, ProcessGroupNCCL and Triton are real, memory is the host's, and
kernels do nothing. What a process did is read by :mod:`tests.cuda_standin.inside`.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache/cuda-standin"
SOURCES = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
FLAGS = ["-O1", "-std=c++17", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]


def folder() -> Path:
    """Returns the folder of the built library, for this torch, or skips the test and says why."""
    found = _build()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache
def _build() -> Path | str:
    """Builds the library once for these sources and this torch; returns its folder, or why there is none."""
    import torch

    compiler = shutil.which("g++")
    if compiler is None:
        return "the stand-in for CUDA needs g++"
    if torch.version.cuda is None:
        return "the stand-in for CUDA needs PyTorch's build for CUDA"
    # The headers come with the wheels that torch brings, those of `crt/` with Triton's.
    site = Path(torch.__file__).parents[1]
    include = [f"-isystem{path}" for path in sorted(site.glob("nvidia/*/include"))]
    last = f"-idirafter{site}/triton/backends/nvidia/include"
    text = b"".join(path.read_bytes() for path in SOURCES) + " ".join([torch.__version__, *FLAGS]).encode()
    target = CACHE / hashlib.sha256(text).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            command = [compiler, *FLAGS, *include, last, "-o", f"{made}/libcuda.so.1"]
            command += [str(path) for path in SOURCES if path.suffix == ".cpp"] + [
                "-ldl",
                "-lpthread",
                "-lrt",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                if any("No such file or directory" in line for line in errors):
                    return f"the stand-in for CUDA needs the headers of CUDA's wheels: {errors[0]}"
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            for name in ("libcuda.so", "libnvidia-ml.so.1"):
                (Path(made) / name).symlink_to("libcuda.so.1")
            shutil.copytree(made, target, symlinks=True)
    return target


def environment(devices: int = 1, **settings: str) -> dict[str, str]:
    """Returns the environment of a process on the stand-in.

    Args:
        devices: GPUs that it has.
        settings: its variables by their name without `STANDIN_`, for example ``ALONE="1"``: see the sources.
    """
    library = folder()
    mine = {"LD_PRELOAD": f"{library}/libcuda.so.1", "STANDIN_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
    mine |= {"TRITON_LIBCUDA_PATH": str(library), "TRITON_CACHE_DIR": str(CACHE / "triton")}
    mine |= {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    mine |= {"LD_LIBRARY_PATH": str(library), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    mine |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return os.environ | mine | {f"STANDIN_{name}": value for name, value in settings.items()}


def run(module: str, *arguments: str, **settings: str) -> Any:
    """Runs a module of this folder on one GPU of the stand-in; returns the JSON of its last line."""
    forker = _forker()
    assert forker.stdin is not None and forker.stdout is not None
    with tempfile.TemporaryDirectory() as made:
        request = {"module": module, "arguments": arguments, "environment": environment(**settings)}
        print(json.dumps(request | {"folder": made}), file=forker.stdin, flush=True)
        status = forker.stdout.readline().strip()
        out, errors = ((Path(made) / name).read_text() for name in ("out", "errors"))
    assert status == "0", (
        f"{module} {' '.join(arguments)}: {status or 'no'} status\n{out[-2000:]}\n{errors[-6000:]}"
    )
    return json.loads(out.splitlines()[-1])


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """Starts the process that forks those of :func:`run`; it ends with this one."""
    command = [sys.executable, "-m", "tests.cuda_standin.forker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # torch refuses CUDA in a fork of a process that has asked CUDA itself how many GPUs there are.
    env = environment() | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
