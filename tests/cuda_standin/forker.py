"""Forks processes on the stand-in from one that has the imports, which take longer than most of them run.

`python -m tests.cuda_standin.forker` reads lines of JSON: the module of this folder to run, its arguments,
its environment, and the folder that takes its output; for each it writes the exit status.
"""

import json
import os
import runpy
import sys
import traceback
from typing import Any

import torch._inductor.compile_fx  # noqa: F401

import launch.gpu_check.one_device
import launch.gpu_check.step  # noqa: F401
import train.health.watchdog
import train.hf.initial_weights
import train.layout.mesh  # noqa: F401


def run(module: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Runs a module as a program would, and ends the process."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        for stream, name in ((1, "out"), (2, "errors")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [module, *arguments]
        runpy.run_module(f"tests.cuda_standin.{module}", run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    request: dict[str, Any] = json.loads(line)
    pid = os.fork()
    if pid == 0:
        run(**request)
    _, ended = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(ended), flush=True)
