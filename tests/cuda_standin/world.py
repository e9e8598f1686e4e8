"""Optimizer steps of one rank of a world that is not there, on the real paths of a run; prints JSON.

`python -m tests.cuda_standin.world RANKS RECIPE [key=value ...]`, with `STANDIN_ALONE=1`: every other rank
sends what this one sends. Of one rank: the whole model on one GPU. Weights are not initialised. With
`STANDIN_TIMELINE` a third step is written into that file; with `STANDIN_NOT_AHEAD` FSDP2 gathers as it would
by itself.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from launch.gpu_check.step import _random_batch
from tests.cuda_standin import inside
from train.layout import mesh
from train.layout.optim import average_replicated_gradients, build_optimizer, clip_gradients
from train.model.decoder import Decoder
from train.recipe.reading import load_recipe
from train.recipe.schema import Precision
from train.recipe.sizes import microbatches_per_rank, recomputed
from train.step.microbatch import MicrobatchModel

world_size = int(sys.argv[1])
recipe = load_recipe(sys.argv[2], sys.argv[3:])
inside.prepare()
distributed_c10d._store_based_barrier = lambda *_, **__: None  # nobody else comes
mesh.initialize = lambda *_: None
if "STANDIN_NOT_AHEAD" in os.environ:
    mesh.gather_ahead = lambda _: None
os.environ["TORCH_NCCL_RANKS_PER_ROOT"] = str(world_size + 1)  # else other ranks would name communicators too
torch.cuda.set_device(0)
training = recipe.training
decoder = Decoder(
    recipe.model,
    device="meta",
    recompute=recomputed(training, recipe.model.n_layers),
    loss_chunk_tokens=training.loss_chunk_tokens,
)
if world_size > 1:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
    # Else torch 2.15 splits the world's communicator, for which every rank has to say its part.
    distributed_c10d._get_default_group().bound_device_id = None
    built = mesh.build_mesh(recipe.parallelism, world_size, "cuda")
    mesh.build_sharded(decoder, built, Precision.bf16, recipe.seed)
else:
    decoder.to_empty(device="cuda")
model = MicrobatchModel(decoder, recipe, Precision.bf16)
optimizer = build_optimizer(model, recipe.optimizer)
batch = _random_batch(recipe, "cuda")


def step() -> None:
    """A step of at most two microbatches: more are as the second."""
    optimizer.zero_grad(set_to_none=True)
    passes = min(2, microbatches_per_rank(recipe, world_size))
    for left in reversed(range(passes)):
        mesh.reduce_gradients(decoder, recipe.parallelism, after_this_pass=left == 0)
        model.loss(model(batch), batch)["total"].backward()
    average_replicated_gradients(model.parameters())
    clip_gradients(model.parameters(), training.clip_norm)
    optimizer.step()


step()  # compiles, and makes the optimizer's state
torch.cuda.reset_peak_memory_stats()
inside.reset()
with inside.Waits() as waits:
    step()
found = {"counts": inside.counts(), "waits": waits.places, "peak": torch.cuda.max_memory_allocated()}
if "STANDIN_TIMELINE" in os.environ:
    inside.lag(True)  # else NCCL's handles would find every collective complete, and no stream would wait
    with inside.Timeline(os.environ["STANDIN_TIMELINE"]):
        step()
print(json.dumps(found), flush=True)
os._exit(0)  # Destroying the process group would wait for the others.
