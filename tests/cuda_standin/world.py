"""Optimizer steps of one rank of a world that is not there, on FSDP2's and NCCL's real paths; prints JSON.

`python -m tests.cuda_standin.world RANKS RECIPE [key=value ...]`, with `STANDIN_ALONE=1`: every other rank
sends what this one sends. Weights are not initialised.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from launch.gpu_check.step import _random_batch, _step
from tests.cuda_standin import inside
from train.layout import mesh
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.recipe.reading import load_recipe
from train.recipe.schema import Precision
from train.step.microbatch import MicrobatchModel

world_size = int(sys.argv[1])
recipe = load_recipe(sys.argv[2], sys.argv[3:])
inside.prepare()
distributed_c10d._store_based_barrier = lambda *_, **__: None  # nobody else comes
mesh.initialize = lambda *_: None
os.environ["TORCH_NCCL_RANKS_PER_ROOT"] = str(world_size + 1)  # else other ranks would name communicators too
torch.cuda.set_device(0)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
# Else torch 2.15 splits the world's communicator, for which every rank has to say its part.
dist.distributed_c10d._get_default_group().bound_device_id = None
training = recipe.training
decoder = Decoder(
    recipe.model,
    device="meta",
    activation_checkpointing=training.activation_checkpointing,
    loss_chunk_tokens=training.loss_chunk_tokens,
)
mesh.build_sharded(
    decoder, mesh.build_mesh(recipe.parallelism, world_size, "cuda"), Precision.bf16, recipe.seed
)
model = MicrobatchModel(decoder, recipe, Precision.bf16)
optimizer = build_optimizer(model, recipe.optimizer)
batch = _random_batch(recipe, "cuda")
_step(model, optimizer, batch, training.clip_norm)  # compiles, and makes the optimizer's state
torch.cuda.reset_peak_memory_stats()
inside.reset()
with inside.Waits() as waits:
    _step(model, optimizer, batch, training.clip_norm)
found = {"counts": inside.counts(), "waits": waits.places, "peak": torch.cuda.max_memory_allocated()}
print(json.dumps(found), flush=True)
os._exit(0)  # Destroying the process group would wait for the others.
