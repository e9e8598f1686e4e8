"""Inputs of layers in host memory, from the next layer's forward pass until their own backward pass.

A layer that is computed again as a whole keeps only its input, and of long sequences those add up: in bf16,
of DBRX's 40 layers at 32,768 tokens, 15 GiB. In host memory they cost a copy each way (ZeRO-Infinity,
Rajbhandari et al. 2021, arXiv 2104.07857, section 5.2.2), on a stream of its own under the arithmetic of a
layer: an input leaves while the next layer is computed, and comes back during that layer's backward pass. At
most two are on the device between passes, however deep the model. The host never waits, and no value changes.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostMemory:
    """Pinned buffers for a model's inputs, used again by every microbatch, and the stream that copies them.

    On a CPU, where layouts are compared, buffers are plain memory and copies are made at once.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._stream: torch.cuda.Stream | None = None

    def take(self, like: Tensor) -> Tensor:
        """Returns a buffer for a tensor."""
        free = self._free[like.shape, like.dtype]
        return free.pop() if free else torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

    def give_back(self, buffer: Tensor) -> None:
        """Lets a buffer be used again: its last copy is before all that are asked for from here on."""
        self._free[buffer.shape, buffer.dtype].append(buffer)

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copies after all that the device was asked for; returns the event of the end, if there is one."""
        device = to.device if to.is_cuda else source.device
        if device.type == "cpu":
            to.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()


@dataclass
class _Input:
    """A layer's input: on the device, in host memory, or on its way."""

    before: "_Input | None"
    """That of the layer before."""
    here: Tensor | None
    there: Tensor | None = None
    copied: torch.cuda.Event | None = None
    """The end of the copy that was asked for last; None: nothing needs to wait for it."""

    def wait(self) -> None:
        """Lets the device, but not the host, wait for the copy."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None


class LayerInputs(saved_tensors_hooks):
    """The inputs of one forward pass, to be entered around the checkpoint of each layer, in order.

    Checkpoints save nothing else. Backward passes are in the reverse order, one of each layer.
    """

    def __init__(self, memory: HostMemory, device: torch.device) -> None:
        super().__init__(self._keep, self._take)
        self.memory, self.device = memory, device
        self.newest: _Input | None = None

    def _keep(self, x: Tensor) -> Tensor | _Input:
        if not x.numel():  # a checkpoint's own mark
            return x
        last = self.newest
        if last is not None:
            if last.before is not None:  # it has been sent while `last` was computed on
                last.before.wait()
                last.before.here = None
            assert last.here is not None
            last.there = self.memory.take(last.here)
            last.copied = self.memory.copy(last.there, last.here)
        self.newest = _Input(last, x.detach())
        return self.newest

    def _take(self, kept: Tensor | _Input) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = self._fetched(kept)
        kept.wait()
        if kept.there is not None:
            self.memory.give_back(kept.there)
        if kept.before is not None:
            self._fetched(kept.before)
        kept.before = kept.here = kept.there = None
        return x

    def _fetched(self, kept: _Input) -> Tensor:
        """Returns the device's copy, which may be on its way."""
        if kept.here is None:
            assert kept.there is not None, "a second backward pass of a layer"
            kept.here = torch.empty_like(kept.there, device=self.device)
            kept.copied = self.memory.copy(kept.here, kept.there)
        return kept.here
