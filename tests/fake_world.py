"""A decoder as one rank of a large world holds it, on torch's fake process group and the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.layout import mesh
from train.model.decoder import Decoder
from train.recipe import sizes
from train.recipe.schema import Model, Moe, Parallelism, Precision

CFG = Model(
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    ffn_hidden_size=24,
    vocab_size=33,
    max_sequence_tokens=8,
    moe=Moe(experts=8, top_k=2),
)
"""A model whose experts several ranks can share."""


@contextmanager
def sharded(cfg: Model, layout: Parallelism, world: int, rank: int) -> Iterator[Decoder]:
    """The decoder as sharded on one rank of a fake process group."""
    _forget_meshes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        _, stage, _ = sizes.place_of(layout, world, rank)
        decoder = Decoder(cfg, device="meta", parts=sizes.stage_parts(cfg, layout, stage))
        mesh.build_sharded(decoder, mesh.build_mesh(layout, world, "cpu"), Precision.bf16, seed=0)
        yield decoder
    finally:
        dist.destroy_process_group()


def _forget_meshes() -> None:
    """Empties DTensor's caches, whose results bring the mesh of a former world if it was equal."""
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    clear_fast_path = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)
    clear_fast_path()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor; every rank asks for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
