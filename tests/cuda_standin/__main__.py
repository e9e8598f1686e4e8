"""Prints what docs/standin.md shows: `python -m tests.cuda_standin`."""

import json

import torch
from tabulate import tabulate

from tests.cuda_standin import standin, test_memory, test_step, test_timeline

REPLAYED = (
    ("MoE-A, 64 GPUs", "dbrx-moe-a", 64),
    ("DBRX, 3,072 GPUs", "dbrx", 3072),
    ("DBRX, expert 8", "dbrx", 3072, "parallelism.expert=8"),
    (
        "DBRX, expert 8, reduced in bf16",
        "dbrx",
        3072,
        "parallelism.expert=8",
        "parallelism.reduce_precision=bf16",
    ),
)
GROUPS = ("kernels", "triton", "products", "copies", "waits", "events", "collectives")


def calls(found: test_step.Step) -> list[int]:
    """Returns the calls of each group."""
    return [test_step.calls(found, group) for group in GROUPS]


steps = dict(
    zip(test_step.CASES, standin.run("step", json.dumps(list(test_step.CASES.values()))), strict=True)
)
rows, peaks = [], []
for recomputed in (False, True):
    two, four = (calls(steps[layers, recomputed]) for layers in (2, 4))
    name = f"tiny MoE-A, {'recomputed' if recomputed else 'kept'}"
    rows.append([f"{name}: a layer", *((b - a) / 2 for a, b in zip(two, four, strict=True))])
    rows.append([f"{name}: all else", *(2 * a - b for a, b in zip(two, four, strict=True))])
for name, case in test_memory.CASES.items():
    found, planned = test_memory.measured(case), test_memory.planned_bytes(case)
    rows.append([f"{name}: a step", *calls(found)])
    peaks.append([name, found["peak"] / 2**30, planned / 2**30, f"{planned / found['peak'] - 1:+.1%}"])
layers = []
for name, stem, ranks, *keys in REPLAYED:
    for is_ahead in (False, True):
        layer = test_timeline.layer_of(stem, ranks, *keys, is_ahead=is_ahead)
        layers.append([f"{name}, {'a layer ahead' if is_ahead else 'as FSDP2 would by itself'}", *layer])
print(f"torch {torch.__version__}\n")
print(tabulate(rows, ["calls", *GROUPS], "github", floatfmt=",g", intfmt=","), end="\n\n")
print(tabulate(layers, ["replayed, ms", *test_timeline.Layer._fields], "github", floatfmt=".1f"), end="\n\n")
print(tabulate(peaks, ["GiB", "allocator's peak", "planned", "error"], "github", floatfmt=".2f"))
