"""Optimizer steps of recipes on one GPU of the stand-in, as `launch.gpu_check` takes them; prints JSON.

`python -m tests.cuda_standin.step CASES`, a JSON list of lists: a recipe's file and overrides of its keys.
An operation that adds in no fixed order raises. With `STANDIN_FLEX` packed documents go through
FlexAttention, as they do where torch has no better kernel.
"""

import gc
import json
import os
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

from launch.gpu_check.one_device import build_on_one_device
from launch.gpu_check.step import _random_batch, _step
from tests.cuda_standin import inside
from train.hf.initial_weights import freeze
from train.layout.device import add_in_fixed_order
from train.layout.optim import build_optimizer
from train.model import attention
from train.model.experts import HAS_GROUPED_MM
from train.recipe.reading import load_recipe
from train.recipe.schema import Compile, Precision


def measure(path: str, overrides: list[str]) -> dict[str, Any]:
    """Returns what the second step of a recipe did: counts, memory, where the host waited, odd operations."""
    recipe = load_recipe(path, overrides)
    clip_norm, moe = recipe.training.clip_norm, recipe.model.moe
    assert moe is not None
    counters.clear()
    model, optimizer = build_on_one_device(recipe, "cuda", Precision.bf16)
    if freeze(model.decoder, recipe.training.frozen):
        optimizer = build_optimizer(model, recipe.optimizer)
    batch = _random_batch(recipe, "cuda")
    inside.reset()
    _step(model, optimizer, batch, clip_norm)  # compiles, and makes the optimizer's state
    modules = inside.counts()["modules"]
    torch.cuda.reset_peak_memory_stats()
    inside.reset()
    with inside.Waits() as waits:
        _step(model, optimizer, batch, clip_norm)
    result = {
        "counts": inside.counts(),
        "waits": waits.places,
        "has_varlen": attention.has_varlen(),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
        "modules": modules,
        "peak": torch.cuda.max_memory_allocated(),
    }
    if recipe.training.compile is not Compile.off:
        return result  # Nothing that is compiled takes a dispatch mode.
    model.document_masking = attention.has_varlen()  # FlexAttention neither
    with inside.SlowOperations(
        moe.experts * recipe.model.ffn_hidden_size * recipe.model.d_model
    ) as operations:
        _step(model, optimizer, batch, clip_norm)
    return result | {"on_cpu": operations.on_cpu, "large_copies": operations.large_copies}


inside.prepare()
if HAS_GROUPED_MM:  # On torch 2.7 scatters in a fixed order make the host wait, and would hide other waits.
    add_in_fixed_order()  # as a run does
    torch.use_deterministic_algorithms(True)  # An operation without a fixed order raises; a run only warns.
if "STANDIN_FLEX" in os.environ:
    attention.has_varlen = lambda: False
found = []
for case in json.loads(sys.argv[1]):
    found.append(measure(case[0], case[1:]))
    gc.collect()
    torch.cuda.empty_cache()
print(json.dumps(found))
