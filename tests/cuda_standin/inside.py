"""For processes on the stand-in: reads what they did, and writes the values that others depend on.

Kernels do nothing, so whatever one computes is what was in memory before. Where a value decides what happens
next, it is set here: the tokens of each expert are even.
"""

import collections
import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
_library = ctypes.CDLL("libcuda.so.1")
_library.standin_counts.restype = ctypes.c_char_p
_library.standin_mark.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_double]
_ON_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

Counts = dict[str, dict[str, tuple[int, float, float]]]
"""By group and name: calls, sum and maximum of their amounts. Groups and amounts: see the sources."""


def reset() -> None:
    """Forgets what was counted."""
    _library.standin_reset()


def counts() -> Counts:
    """Returns what was counted since :func:`reset`."""
    found: Counts = collections.defaultdict(dict)
    for line in _library.standin_counts().decode().splitlines():
        group, name, calls, total, largest = line.split("\t")
        found[group][name] = (int(calls), float(total), float(largest))
    return found


def lag(is_on: bool) -> None:
    """Lets the device be behind the host: an event is complete once the host has waited after its record."""
    _library.standin_lags(int(is_on))


class Waits:
    """Records the lines of ours at which the host waits for the device, while the context is entered."""

    def __init__(self) -> None:
        self.places: collections.Counter[str] = collections.Counter()
        self._callback = _ON_WAIT(self._record)

    def __enter__(self) -> "Waits":
        _library.standin_on_wait(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        _library.standin_on_wait(_ON_WAIT())

    def _record(self, _what: bytes) -> None:
        self.places[place_of(sys._getframe(1))] += 1


class Timeline(TorchDispatchMode):
    """Writes every call into a file while the context is entered, and between them what each operation is.

    Around the calls that an operation of PyTorch makes there are lines where it begins and ends, with the
    bytes that it reads and writes, and its FLOPs if they are known; :mod:`tests.cuda_standin.replay` reads
    it.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def __enter__(self) -> "Timeline":
        _library.standin_timeline(self.path.encode())
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        _library.standin_timeline(None)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).encode()
        _library.standin_mark(b"begin", name, 0.0)
        out = func(*args, **kwargs)
        read, written = _bytes((args, kwargs)), _bytes(out)
        _library.standin_mark(b"flops", name, _flops(func.overloadpacket, args, kwargs, out))
        _library.standin_mark(b"read", name, read)
        _library.standin_mark(b"written", name, written)
        _library.standin_mark(b"end", name, 0.0)
        return out


def _flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of an operation; 0 of one that is not a product or attention."""
    if operation.__name__ == "_grouped_mm":
        # Groups of rows by a stack of matrices, or, for their gradients, groups of rows by groups of rows.
        return 2.0 * args[0].numel() * args[1].shape[-1]
    counted = flop_registry.get(operation)
    if counted is None or out is None:
        return 0.0
    if "scaled_dot_product" in operation.__name__:  # older formulas know no heads that share keys
        heads = max(each.shape[1] for each in args if _has_heads(each))
        args = tuple(_with_heads(each, heads) if _has_heads(each) else each for each in args)
    return float(counted(*args, **kwargs, out_val=out))


def _has_heads(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.ndim == 4


def _with_heads(like: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns a tensor without values, of a shape with other heads."""
    return like.new_empty((like.shape[0], heads, *like.shape[2:]), device="meta")


def _bytes(tree: Any) -> float:
    """The bytes of a tree's tensors on the device; of a sharded one, those of this rank's shard."""
    found = 0
    for leaf in tree_leaves(tree):
        tensor = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            found += tensor.numel() * tensor.element_size()
    return float(found)


class SlowOperations(TorchDispatchMode):
    """Records what no step on a GPU should do: operations on the CPU, and copies of large tensors.

    Args:
        large: elements from which on a tensor is large.
    """

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.on_cpu: collections.Counter[str] = collections.Counter()
        self.large_copies: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        is_vector = any(tensor.dim() and tensor.numel() for tensor in tensors)
        if is_vector and all(tensor.device.type == "cpu" for tensor in tensors):
            self.on_cpu[place_of(sys._getframe(1))] += 1
        copies = name in ("copy_", "_to_copy", "clone", "cat", "stack", "contiguous")
        if copies and isinstance(out, torch.Tensor) and out.numel() >= self.large:
            source = tensors[0] if name == "_to_copy" else tensors[-1]
            cast = f"{source.dtype} to {out.dtype}".replace("torch.", "")
            self.large_copies[f"{place_of(sys._getframe(1))} {name} {cast}"] += 1
        return out


def place_of(frame: types.FrameType | None) -> str:
    """Returns the innermost function of this project, or MegaBlocks', that a frame was called from."""
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_qualname
        for base in (f"{ROOT}/", "site-packages/megablocks/"):
            own = path.partition(base)[2]
            if own and "tests/cuda_standin" not in path and ".venv" not in own:
                return f"{own}: {function.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "autograd"


def prepare() -> None:
    """Makes a process on the stand-in go where one on a GPU goes; call it before a model is built."""
    # torch prefers cuDNN for attention. It looks into the device, which is none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    _route_evenly()


def _route_evenly() -> None:
    """Gives each expert as many tokens as any other, after the kernels that would have counted them."""
    from train.model import experts, megablocks_ops

    histogram, grouped_glu = megablocks_ops.histogram, experts.grouped_glu

    def even_histogram(x_R: torch.Tensor, bins: int) -> torch.Tensor:
        return _written(histogram(x_R, bins), even(x_R.numel(), int(bins)))

    def even_glu(x_RD: torch.Tensor, *weights: torch.Tensor, keeps_gates: bool) -> torch.Tensor:
        # With expert parallelism a kernel added what the ranks sent.
        *weights_EFD, tokens_E = weights
        counts_E = _written(tokens_E, even(len(x_RD), len(tokens_E)))
        return grouped_glu(x_RD, *weights_EFD, counts_E, keeps_gates=keeps_gates)

    _cross_evenly()
    megablocks_ops.histogram = even_histogram
    sys.modules["megablocks_ops"].histogram = even_histogram  # type: ignore[attr-defined]
    experts.grouped_glu = even_glu


def _cross_evenly() -> None:
    """Sends tokens that cross once to each node to as many as the plan says, after the host has waited."""
    from launch.plan.nodes import expected_nodes
    from train.model.node_exchange import NodeCounts, OnHost

    begin, wait = NodeCounts.__init__, NodeCounts.on_host

    def init(self: NodeCounts, is_there_TM: torch.Tensor, experts_TK: torch.Tensor, *others: Any) -> None:
        begin(self, is_there_TM, experts_TK, *others)
        (tokens, nodes), rows = is_there_TM.shape, experts_TK.numel()
        local, _, of_rank = self.arriving_LMQ.shape
        crossing = expected_nodes(local * nodes * of_rank, experts_TK.shape[1], nodes)
        crossed, passed = even(round(crossing * tokens), nodes), even(rows, local)
        self.even = OnHost(crossed, crossed, passed, passed, torch.tensor(even(rows, of_rank)).int())

    def on_host(self: NodeCounts) -> OnHost:
        wait(self)
        counts = self.even
        _written(self.crossed_M, counts.received_M)
        parts = self.arriving_LMQ.numel()
        _written(self.arriving_LMQ.view(-1), even(sum(counts.arriving_L), parts))
        return counts

    NodeCounts.__init__, NodeCounts.on_host = init, on_host  # type: ignore[method-assign]


def even(total: int, parts: int) -> list[int]:
    """Returns ``parts`` counts that differ by at most 1 and sum to ``total``."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _written(target: torch.Tensor, values: list[int]) -> torch.Tensor:
    """Writes values from the host as if a kernel had, uncounted; not into a graph that is traced."""
    if torch.compiler.is_compiling():
        return target
    _library.standin_counting(0)
    try:
        with _disable_current_modes():
            return target.copy_(torch.tensor(values, dtype=target.dtype))
    finally:
        _library.standin_counting(1)
