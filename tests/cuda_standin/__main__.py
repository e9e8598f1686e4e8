"""Prints the tables of docs/standin.md: `python -m tests.cuda_standin`."""

import json

import torch
from tabulate import tabulate
from torch.distributed.fsdp import FSDPModule

from launch.plan.hardware import GPUS
from tests.cuda_standin import standin, test_memory, test_step, test_timeline
from train.recipe import sizes
from train.recipe.reading import load_recipe
from train.recipe.schema import Recompute

IN_BF16 = "parallelism.reduce_precision=bf16"
ONCE = "parallelism.exchange_node_ranks=8"
REPLAYED = (
    ("MoE-A, 64 GPUs", "dbrx-moe-a", 64),
    ("DBRX, 3,072 GPUs", "dbrx", 3072),
    ("DBRX, expert 16", "dbrx", 3072, "parallelism.expert=16"),
    ("DBRX, expert 16, once per node", "dbrx", 3072, "parallelism.expert=16", ONCE),
    ("DBRX, reduced in bf16", "dbrx", 3072, IN_BF16),
)
GATHERED = "nothing, all layers stay gathered"
GROUPS = ("kernels", "triton", "products", "copies", "waits", "events", "collectives")


def calls(found: test_step.Step) -> list[int]:
    """Returns the calls of each group."""
    return [test_step.calls(found, group) for group in GROUPS]


def print_counts() -> None:
    """Prints what a step asks of host and device, and its memory measured and planned."""
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
    print(tabulate(rows, ["calls", *GROUPS], "github", floatfmt=",g", intfmt=","), end="\n\n")
    print(
        tabulate(peaks, ["GiB", "allocator's peak", "planned", "error"], "github", floatfmt=".2f"), end="\n\n"
    )


def print_replays() -> None:
    """Prints replayed layers, as FSDP2 orders traffic and a layer ahead, and by grade of recomputation."""
    layers, grades = [], []
    for name, stem, ranks, *keys in REPLAYED:
        for is_ahead in (False, True):
            layer = test_timeline.layer_of(stem, ranks, *keys, is_ahead=is_ahead)
            layers.append([f"{name}, {'a layer ahead' if is_ahead else 'as FSDP2 would by itself'}", *layer])
    for name, stem, ranks in (row[:3] for row in REPLAYED[:2]):
        recipe = load_recipe(test_timeline.YAMLS / f"{stem}.yaml")
        length = recipe.data.sequence_tokens
        flops = sizes.flops_per_token_training(recipe.model, length).total
        flops *= recipe.training.microbatch_sequences * length
        rows = [(grade.value, f"training.recompute={grade.value}") for grade in Recompute]
        if stem == "dbrx-moe-a":
            kept = "training.recompute=nothing"
            rows += [(GATHERED, kept), (f"{GATHERED}, reduced in bf16", kept, IN_BF16)]
        for what, *keys in rows:
            layer = test_timeline.layer_of(stem, ranks, *keys, gathers_all=what.startswith(GATHERED))
            seconds = (layer.rest + recipe.model.n_layers * layer.total) / 1000
            share = flops / seconds / GPUS["h100"].matrix_flops
            grades.append([f"{name}: {what}", layer.total, layer.open, seconds, f"{share:.1%}"])
    fields = test_timeline.LayerTimes._fields
    print(tabulate(layers, ["replayed, ms", *fields], "github", floatfmt=".1f"), end="\n\n")
    columns = ["recomputed, replayed", "a layer, ms", "open, ms", "a step, s", "utilisation"]
    print(tabulate(grades, columns, "github", floatfmt=("", ".1f", ".1f", ".2f")))


print(f"torch {torch.__version__}\n")
print_counts()
if hasattr(FSDPModule, "set_reduce_scatter_max_input_buffers"):
    print_replays()
else:
    print("Replays need torch 2.15 or newer: before, an expert's reduce-scatter waits for the one before.")
