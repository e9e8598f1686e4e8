"""Each patch of torch is applied where torch needs it, and is still needed there.

Without a patch the installed torch must fail as the patch says. Once torch is correct by itself the test
fails: end the patch's range of versions there, or remove the patch.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from launch.verify.forked_ranks import run_ranks
from train.health.collectives import recorded_collectives
from train.layout import torch_patches
from train.layout.mesh import sum_on_gloo
from train.layout.torch_patches import PATCHES, TorchVersions, apply_torch_patches
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

WIDTH = 2


def restore_torch() -> None:
    """Undoes the patches of this process and its parent."""
    _fsdp_collectives._get_gradient_divide_factors = torch_patches._divide_factors
    torch.cpu.Stream.record_event = torch_patches._record_event
    FSDPParamGroup.finalize_backward = torch_patches._finalize_backward
    FSDPParamGroup.post_forward = torch_patches._post_forward


def linear(value: float = 1.0) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def mean_gradient(topology: Topology, shape: tuple[int, ...] = (2,)) -> list[float]:
    """Gradients of a sharded weight, to which rank r contributes r + 1: the mean is 1.5."""
    layer = linear()
    fully_shard(layer, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)]))
    sum_on_gloo(layer)
    layer(torch.full((1, WIDTH), topology.rank + 1.0)).sum().backward()
    assert isinstance(layer.weight.grad, DTensor)
    return layer.weight.grad.full_tensor().flatten().tolist()


def averages(topology: Topology) -> bool:
    return mean_gradient(topology) == [1.5] * WIDTH**2


def shards_with_replicas(topology: Topology) -> bool:
    return mean_gradient(topology, (2, 1)) == [1.5] * WIDTH**2


class TwoBranches(nn.Module):
    """Two units, only the second with a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.busy = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.busy(x)


def gathers_ahead_in_vain(_: Topology) -> bool:
    model, mesh = TwoBranches(), init_device_mesh("cpu", (2,))
    for unit in (model.idle, model.busy, model):
        fully_shard(unit, mesh=mesh)
    model(torch.ones(1, WIDTH)).sum().backward()
    return True


class NestedLayer(nn.Module):
    """A layer that contains another unit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


class Recomputed(nn.Module):
    """Layers that are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NestedLayer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def gathers_each_weight_twice(_: Topology) -> bool:
    model, mesh = Recomputed(), init_device_mesh("cpu", (2,))
    units = [unit for layer in model.layers for unit in (layer.inner, layer)]
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh)
    with recorded_collectives() as recorder:
        model(torch.ones(1, WIDTH)).sum().backward()
    # The method's name is another from torch 2.8 on.
    gathers = [c for c in recorder.last(64) if c.operation in ("allgather_base", "all_gather_single")]
    return len(gathers) == 2 * len(units)


NEEDS: dict[Callable[[], None], Callable[[Topology], bool]] = {
    torch_patches.average_gradients_on_gloo: averages,
    torch_patches.give_cpu_streams_events: shards_with_replicas,
    torch_patches.drop_events_of_unused_gathers: gathers_ahead_in_vain,
    torch_patches.keep_recomputed_weights: gathers_each_weight_twice,
}


def does_right(left_out: Callable[[], None] | None, does: Callable[[Topology], bool]) -> bool:
    """Returns whether two ranks behave correctly with all patches but one."""

    def work(topology: Topology) -> bool:
        restore_torch()
        for patch, versions in PATCHES.items():
            if patch is not left_out and versions.include(torch.__version__):
                patch()
        try:
            return does(topology)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            return False

    return all(run_ranks(2, work))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_torch_fails_without_a_patch_exactly_where_its_range_says_so(patch: Callable[[], None]) -> None:
    assert does_right(None, NEEDS[patch]), "with all patches it must do right"
    fails = not does_right(patch, NEEDS[patch])
    version = torch.__version__
    if PATCHES[patch].include(version):
        assert fails, (
            f"torch {version} no longer needs {patch.__name__}: end its range before it, or remove it"
        )
    else:
        assert not fails, f"torch {version} needs {patch.__name__}: widen its range"


@pytest.mark.parametrize(
    ("version", "is_included"),
    [("2.6.1", False), ("2.7.0+cu126", True), ("2.10.1", True), ("2.11.0", False), ("3.0.0a0+git1", False)],
)
def test_a_range_ends_before_its_second_version(version: str, is_included: bool) -> None:
    assert TorchVersions((2, 7), before=(2, 11)).include(version) is is_included


def test_nothing_is_patched_where_torch_needs_nothing() -> None:
    def work(_: Topology) -> list[object]:
        restore_torch()
        apply_torch_patches("2.10.0")
        return [
            _fsdp_collectives._get_gradient_divide_factors is torch_patches._divide_factors,
            torch.cpu.Stream.record_event is torch_patches._record_event,
            FSDPParamGroup.finalize_backward is torch_patches._finalize_backward,
            FSDPParamGroup.post_forward is torch_patches._post_forward,
        ]

    assert run_ranks(1, work) == [[True] * 4]
