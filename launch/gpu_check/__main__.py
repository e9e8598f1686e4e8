"""Bring-up check of a GPU: `python -m launch.gpu_check` checks kernels, numerics, memory and speed.

It ends after at most 10 minutes with its findings so far. Without a GPU it says so and exits with status 0.
It needs only PyTorch, MegaBlocks as pure Python and OmegaConf, and so runs in a vendor's container without
Composer or a network.
"""

import datetime
import faulthandler
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from train.record.command import Figures, command
from train.record.log import progress

if TYPE_CHECKING:
    from launch.gpu_check.rows import CheckRow

NUMERICS_RECIPE = "yamls/smoke.yaml"
SPEED_RECIPE = "yamls/dbrx-moe-a.yaml"
LIMIT_SECONDS = 590
STACK_DUMP_SECONDS = 10
"""Grace after the limit: a hang in C ignores signals, so the stacks are dumped and the process exits."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--output", default="gpu-check.md", help="file of the table (default %(default)s)")


@command(
    "python -m launch.gpu_check",
    "Checks kernels, numerics, memory and speed of this GPU and writes a table for the docs.",
    add_arguments,
    json="write the rows as JSON too",
)
def main(options: Namespace) -> int | Figures:
    """Runs all checks; returns status 1 if one fails."""
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no NVIDIA GPU on this machine: nothing to check")
        return 0
    progress.info("gpu-check: importing MegaBlocks")
    from launch.gpu_check.rows import CheckRow, table
    from train.layout.device import describe_hardware
    from train.record.provenance import git_commit

    rows: list[CheckRow] = []
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, _is_over)
    faulthandler.dump_traceback_later(LIMIT_SECONDS + STACK_DUMP_SECONDS, exit=True)
    for name, check in parts().items():
        progress.info(f"gpu-check: {name}")
        try:
            # Parts after the limit get a moment, so that they are reported as not done.
            signal.setitimer(signal.ITIMER_REAL, max(0.01, LIMIT_SECONDS - (time.monotonic() - begun)))
            rows += check()
        except Exception as error:  # A part that breaks must not hide the findings of the others.
            rows.append(
                CheckRow(name, "raised", f"{type(error).__name__}: {error}".split("\n")[0], "", False)
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    about = (
        f"{describe_hardware('cuda')}; torch {torch.__version__}, CUDA {torch.version.cuda}; commit "
        f"{git_commit()}; {datetime.date.today().isoformat()}; {time.monotonic() - begun:.0f} s"
    )
    text = f"`make gpu-check` on {about}:\n\n{table(rows)}\n"
    print(f"\n{text}")
    Path(options.output).write_text(text)
    failed = sum(not row.passed for row in rows)
    print(f"gpu-check: {len(rows) - failed} of {len(rows)} passed; the table is in {options.output}")
    return Figures({"about": about, "rows": [asdict(r) for r in rows]}, 1 if failed else 0)


def _is_over(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"not done when {LIMIT_SECONDS} s were over")


def parts() -> "dict[str, Callable[[], list[CheckRow]]]":
    """Returns the checks for this machine's GPU by name, in order."""
    import torch

    from launch.gpu_check.attention import check_attention
    from launch.gpu_check.kernels import check_kernels
    from launch.gpu_check.numerics import check_numerics
    from launch.gpu_check.rows import CheckRow
    from launch.gpu_check.step import check_step, gpu_of, slice_of
    from train.preflight.node import check_compiler
    from train.recipe.reading import load_recipe
    from train.recipe.schema import Precision

    root = Path(__file__).resolve().parents[2]
    properties = torch.cuda.get_device_properties(0)
    compiler = check_compiler()
    if compiler.problem:
        print(f"gpu-check: {compiler.problem}")
    return {
        "compiler": lambda: [
            CheckRow("compiler", "for Triton", compiler.found, compiler.wanted, not compiler.problem)
        ],
        "kernels": lambda: check_kernels("cuda"),
        "attention": lambda: check_attention("cuda"),
        "numerics": lambda: check_numerics(
            "cuda", load_recipe(root / NUMERICS_RECIPE), (Precision.fp32, Precision.bf16)
        ),
        "memory and speed": lambda: check_step(
            "cuda",
            slice_of(load_recipe(root / SPEED_RECIPE), properties.total_memory),
            gpu_of(properties.name),
        ),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
