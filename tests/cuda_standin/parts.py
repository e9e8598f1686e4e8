"""Parts of a step on one GPU of the stand-in, each by itself; prints JSON.

`python -m tests.cuda_standin.parts FOLDER`, with `STANDIN_ALONE=1`; FOLDER takes the records of a hang.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from tests.cuda_standin import inside
from train.health.collectives import collectives_of, recorded_collectives
from train.health.nccl import keep_collectives
from train.health.watchdog import Watchdog
from train.model.attention import Attention, plan_attention
from train.model.loss import chunked_cross_entropy
from train.model.norms import make_norm
from train.model.offload import HostMemory, LayerInputs
from train.recipe.reliability import Watch
from train.recipe.schema import Model, Norm
from train.recipe.topology import Topology

B, S, D, H, G, V, CHUNK = 2, 512, 256, 4, 2, 4096, 128
COLLECTIVES, ELEMENTS = 8, 1 << 20


def asked(work: Callable[[], object]) -> dict[str, Any]:
    """Returns what some work asks of the device, and the most memory that it takes, the second time."""
    work()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    inside.reset()
    work()
    return inside.counts() | {"peak": torch.cuda.max_memory_allocated() - before}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns a tensor that wants a gradient."""
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


def norm(kind: Norm) -> dict[str, Any]:
    """A norm of a layer, as FSDP2 runs it: its input and its weight are bf16."""
    module = make_norm(Model(d_model=D, norm=kind), "cuda").bfloat16()
    x_BSD = random(B, S, D)
    with torch.autocast("cuda", torch.bfloat16):
        out = module(x_BSD)
        found = asked(lambda: module(x_BSD))
    assert out.dtype == torch.bfloat16
    return found


def attention(masked: bool, kv_heads: int) -> dict[str, Any]:
    """The forward pass of a layer's attention."""
    model = Model(d_model=D, n_heads=H, n_kv_heads=kv_heads, max_sequence_tokens=S)
    module = Attention(model, "cuda").bfloat16()
    x_BSD, documents_BS = random(B, S, D), torch.zeros(B, S, dtype=torch.int64, device="cuda")
    ids = documents_BS if masked else None
    plan = plan_attention(model, B, S, device=x_BSD.device, dtype=torch.bfloat16, document_ids_BS=ids)
    return asked(lambda: module(x_BSD, plan))


def loss(tokens: int) -> dict[str, Any]:
    """The loss of some tokens, both passes."""
    hidden_TD, weight_VD = random(tokens, D), random(V, D)
    targets_T = torch.zeros(tokens, dtype=torch.int64, device="cuda")

    def both() -> None:
        chunked_cross_entropy(hidden_TD, weight_VD, targets_T, CHUNK)[0].backward()
        hidden_TD.grad = weight_VD.grad = None

    return asked(both)


class _Read(torch.autograd.Function):
    """Saves its input, and reads it in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.read = read
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.read.append(ctx.saved_tensors[0].cpu())
        return grad, None


def offload() -> dict[str, Any]:
    """Six layers' inputs, in host memory and back: those that came back wrong, and what they take."""
    memory, device = HostMemory(), torch.device("cuda")
    values = torch.randn(6, 1 << 20)

    def both() -> list[Tensor]:
        read: list[Tensor] = []
        out, inputs = torch.empty(1 << 20, device=device, requires_grad=True), LayerInputs(memory, device)
        for value in values:
            out.data.copy_(value)
            with inputs:
                out = _Read.apply(out, read)
        out.sum().backward()
        return read

    read = both()
    found = asked(lambda: read.extend(both()))
    wrong = sum(not torch.equal(x, value) for x, value in zip(read, [*values.flip(0)] * 3, strict=True))
    return found | {"wrong": wrong}


def join() -> None:
    """Joins a world of two ranks, of which the other is not there."""
    keep_collectives()
    distributed_c10d._store_based_barrier = lambda *_, **__: None
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=2)


def held(recording: AbstractContextManager[object]) -> int:
    """Returns the bytes that are held after collectives whose tensors nobody has, on a GPU that lags."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with recording:
        for _ in range(COLLECTIVES):
            work = dist.all_reduce(torch.empty(ELEMENTS, device="cuda"), async_op=True)
            assert work is not None
            work.wait()
            del work
        return torch.cuda.memory_allocated() - before


def hang(folder: Path) -> list[int]:
    """Lets the watchdog find a GPU that does not get on; returns the status that it ends the process with."""
    statuses: list[int] = []
    recipe, topology = Watch(hang_seconds=0.5, start_seconds=0.5), Topology(0, 2, 0, 2)
    with collectives_of(True) as recorder:
        watchdog = Watchdog(recipe, folder, folder, topology, recorder, statuses.append)
        dist.all_reduce(torch.empty(ELEMENTS, device="cuda"))
        watchdog.start()
        watchdog._thread.join()
        watchdog.stop()
    return statuses


inside.prepare()
torch.cuda.set_device(0)
found: dict[str, Any] = {f"norm {kind.value}": norm(kind) for kind in Norm}
for masked, name in ((False, "attention"), (True, "attention, documents")):
    found |= {name: attention(masked, G), f"{name}, not grouped": attention(masked, H)}
found |= {f"loss of {chunks} chunks": loss(chunks * CHUNK) for chunks in (2, 6)}
found["offload"] = offload()
join()
held(nullcontext())  # makes the communicator
inside.lag(True)
recordings = {"none": nullcontext(), "of a run": collectives_of(True), "of gloo": recorded_collectives()}
found["held"] = {name: held(recording) for name, recording in recordings.items()}
found["ended"] = hang(Path(sys.argv[1]))
print(json.dumps(found), flush=True)
os._exit(0)  # Destroying the process group would wait for the other rank.
