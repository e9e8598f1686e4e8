"""Patches of torch's private functions for FSDP2, each with the versions of torch that need it.

:func:`apply_torch_patches` applies only those that the installed torch needs: 2.7.0 all four and 2.15 none,
as tested; 2.8.0 and 2.9.1 three and 2.10 none, as read in their source. The test of this module runs the
installed torch without each patch, and fails if the range is wrong for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

Version = tuple[int, int]


class TorchVersions(NamedTuple):
    """A range of torch versions by major and minor number."""

    first: Version
    before: Version
    """The first version after the range."""

    def include(self, version: str) -> bool:
        """Returns whether a version, such as `2.7.0+cu126`, is in the range."""
        major, minor, *_ = version.split(".")
        return self.first <= (int(major), int(minor)) < self.before


# Torch's originals, saved before any patch, so that applying a patch twice does not wrap it twice.
_divide_factors = _fsdp_collectives._get_gradient_divide_factors
_record_event = torch.cpu.Stream.record_event
_finalize_backward = FSDPParamGroup.finalize_backward
_post_forward = FSDPParamGroup.post_forward

AVERAGES_ON_GLOO = TorchVersions((2, 7), before=(2, 8))
"""Later versions have a public call for it, see :func:`train.layout.mesh.sum_on_gloo`."""


def average_gradients_on_gloo() -> None:
    """Makes FSDP2 on a CPU sum gradients and divide them itself; a GPU's path is unchanged.

    FSDP2 asks for ReduceOp.AVG. Gloo refuses it in an all-reduce, and in a reduce-scatter silently returns
    the sum: gradients would be too large by the number of ranks, which Adam hides but clipping does not.
    Given factors to divide by, FSDP2 asks for sums.
    """

    def factors(
        reduce_scatter_group: dist.ProcessGroup,
        all_reduce_group: dist.ProcessGroup | None,
        reduce_dtype: torch.dtype,
        device_type: str = "",
    ) -> Any:
        if device_type != "cpu":
            return _divide_factors(reduce_scatter_group, all_reduce_group, reduce_dtype, device_type)
        replicas = all_reduce_group.size() if all_reduce_group is not None else 1
        return 1.0, float(reduce_scatter_group.size() * replicas)

    # As a plain assignment it would not fit the types of later versions.
    setattr(_fsdp_collectives, "_get_gradient_divide_factors", factors)  # noqa: B010


EVENTS_OF_CPU_STREAMS = TorchVersions((2, 7), before=(2, 10))


def give_cpu_streams_events() -> None:
    """Makes CPU streams record an event; torch returns None, and hybrid sharding asserts that it is not."""
    torch.cpu.Stream.record_event = lambda _stream: torch.cpu.Event()  # type: ignore


UNUSED_GATHERS_ON_CPU = TorchVersions((2, 7), before=(2, 10))


def drop_events_of_unused_gathers() -> None:
    """Lets a backward pass on a CPU end with prefetched weights that were never used.

    FSDP2 would make an accelerator's stream wait for the gather's event, now that a CPU records one.
    """

    def finalize_backward(group: FSDPParamGroup) -> None:
        gathered = group._all_gather_result
        if gathered is not None and group.device.type == "cpu":
            group._all_gather_result = gathered._replace(all_gather_event=None)
        _finalize_backward(group)

    FSDPParamGroup.finalize_backward = finalize_backward  # type: ignore[method-assign]


RECOMPUTED_WEIGHTS = TorchVersions((2, 7), before=(2, 10))


def keep_recomputed_weights() -> None:
    """Keeps the weights of units inside a recomputed layer until their backward pass, on any device.

    Recomputation runs a layer's forward pass in the middle of the backward pass. FSDP2 would free the
    experts' weights at its end and gather them again at once; and having recorded the forward pass twice, it
    would prefetch experts that are already done. With this patch experts are gathered twice a step, not four
    times.
    """

    def post_forward(group: FSDPParamGroup, module: nn.Module, inputs: Any, output: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            return _post_forward(group, module, inputs, output)
        group._training_state = TrainingState.IDLE
        return output

    FSDPParamGroup.post_forward = post_forward  # type: ignore


PATCHES: dict[Callable[[], None], TorchVersions] = {
    average_gradients_on_gloo: AVERAGES_ON_GLOO,
    give_cpu_streams_events: EVENTS_OF_CPU_STREAMS,
    drop_events_of_unused_gathers: UNUSED_GATHERS_ON_CPU,
    keep_recomputed_weights: RECOMPUTED_WEIGHTS,
}


def apply_torch_patches(version: str = torch.__version__) -> None:
    """Applies the patches that a version of torch needs. Repeated calls are cheap."""
    for patch, versions in PATCHES.items():
        if versions.include(version):
            patch()
