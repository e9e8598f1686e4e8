"""Inputs in host memory: the same gradients, buffers used again, two inputs on the device. The copies between
host and GPU run on the stand-in (tests/cuda_standin/test_parts.py)."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.train.model.test_decoder import CFG, batch, total
from tests.train.model.test_recompute import make, require_equal
from train.model.offload import HostMemory, LayerInputs
from train.recipe.schema import Recompute

LAYERS = 6


@pytest.mark.parametrize("first", [LAYERS, 4, 1])
def test_gradients_of_two_microbatches_are_those_of_inputs_that_stay(first: int) -> None:
    cfg = replace(CFG, n_layers=LAYERS)
    grades = [Recompute.layer] * first + [Recompute.gates] * (LAYERS - first)
    found = []
    for offload in (False, True):
        model = make(cfg, grades, keyed=True)
        model.set_offload(offload)
        for _ in range(2):
            total(model(*batch())).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    require_equal(*found)


class Inputs(LayerInputs):
    """Counts inputs on the device after every step."""

    def __init__(self, memory: HostMemory) -> None:
        super().__init__(memory, torch.device("cpu"))
        self.kept: list[Any] = []
        self.most = 0

    def _keep(self, x: Tensor) -> Any:
        found = super()._keep(x)
        self.kept += [found] if found is not x else []
        return self._counted(found)

    def _take(self, kept: Any) -> Tensor:
        return self._counted(super()._take(kept))

    def _counted(self, result: Any) -> Any:
        self.most = max(self.most, sum(kept.here is not None for kept in self.kept))
        return result


def test_two_inputs_are_on_the_device_and_buffers_are_used_again() -> None:
    memory = HostMemory()
    addresses = []
    for _ in range(2):
        x, inputs = torch.randn(3, 5, requires_grad=True), Inputs(memory)
        out = x
        for _ in range(LAYERS):
            with inputs:
                out = checkpoint(torch.sin, out, use_reentrant=False)
        assert sum(kept.there is not None for kept in inputs.kept) == LAYERS - 1  # the last stays
        out.sum().backward()
        assert inputs.most == 2
        del inputs, out
        gc.collect()
        addresses.append({buffer.data_ptr() for each in memory._free.values() for buffer in each})
    assert addresses[0] == addresses[1] and len(addresses[0]) == LAYERS - 1
