"""Selective recomputation: what each layer keeps for its backward pass, and what it computes again there.

The deepest grades, :attr:`Recompute.ffn` and :attr:`Recompute.layer`, are torch's checkpoints (Chen et al.
2016, arXiv 1604.06174) of half a layer or of all of it. The others keep products, attention and the exchange
of tokens, and drop only what costs little to make again, as in Korthikanti et al. 2022 (arXiv 2205.05198,
section 5): a layer names its cheap parts by :func:`remade`, and what autograd would save of their results is
replaced by a note of how to make it. torch's own selective checkpoints
(``create_selective_checkpoint_contexts``) intercept every operation of a layer twice in Python, and repeat an
exchange, whose operation returns nothing to keep; here neither pass has more operations than it needs.

What is made again is made by the same operations from the same numbers: gradients are equal bit for bit.
"""

import collections
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from train.model.offload import LayerInputs
from train.recipe.schema import Recompute

Value = TypeVar("Value")


def run_layer(
    how: Recompute, layer: nn.Module, *inputs: Any, draws: bool, away: LayerInputs | None = None
) -> Any:
    """Runs a layer so that its backward pass computes again what ``how`` says.

    Args:
        how: what the layer's backward pass makes again.
        layer: a module whose cheap parts run in :func:`remade`.
        inputs: of the layer.
        draws: the layer draws random numbers, which recomputation has to repeat.
        away: where inputs of layers that are made again as a whole are kept; None: where they are.
    """
    if how is Recompute.nothing or not torch.is_grad_enabled():
        return layer(*inputs)
    if how is Recompute.layer:
        with away or contextlib.nullcontext():
            return _checkpoint(layer, *inputs, draws=draws)
    with _Scope(how, draws):
        return layer(*inputs)


def run_ffn(ffn: nn.Module, x: Tensor) -> Any:
    """Runs a layer's feed-forward part, which :attr:`Recompute.ffn` makes again as a whole."""
    if is_remade(Recompute.ffn):
        assert _now.scope is not None
        return _checkpoint(ffn, x, draws=_now.scope.draws)
    return ffn(x)


def is_remade(grade: Recompute) -> bool:
    """Returns whether the layer that is running makes again what a grade names."""
    # Compiled code keeps what the compiler chooses; nor may it depend on which scope is entered.
    return not torch.compiler.is_compiling() and _now.scope is not None and _now.scope.how.includes(grade)


def remade(grade: Recompute, function: Callable[..., Any], *inputs: Any) -> Any:
    """Runs a function of tensors whose results are dropped, and made again in the backward pass.

    The function draws no random numbers, and its results depend on its inputs and on weights only. In layers
    that keep what ``grade`` names it runs as it is.

    Args:
        grade: the least grade that makes this part again.
        function: returns a tensor or a tuple of tensors, none of which is changed in place later.
        inputs: kept, unless they are results of such a function themselves.
    """
    if not is_remade(grade):
        return function(*inputs)
    assert _now.scope is not None
    return _now.scope.run(function, inputs)


def is_dropped(x: Tensor) -> bool:
    """Returns whether a tensor is a result of :func:`remade`, or its view, in the layer that is running."""
    return not torch.compiler.is_compiling() and _now.scope is not None and _now.scope.find(x) is not None


def is_recomputing() -> bool:
    """Returns whether a checkpoint is recomputed in the backward pass."""
    return _now.memory is not None and _now.memory.next is not None


def kept(make: Callable[[], Value]) -> Value:
    """Returns what a function makes; where a checkpoint is recomputed, what it made in the forward pass.

    For what the host waits for, such as the numbers of tokens that ranks exchange: waiting again would be in
    vain. The function runs without gradients.
    """
    # Dynamo's graphs take nothing from lists that grow.
    if torch.compiler.is_compiling() or _now.memory is None:
        return make()
    return _now.memory.kept(make)


class _Memory:
    """Results of :func:`kept` in a checkpoint's forward pass, in order."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next: int | None = None
        """Place of the value that recomputation takes next; None in the forward pass."""

    def kept(self, make: Callable[[], Value]) -> Value:
        if self.next is None:
            self.values.append(make())
            return self.values[-1]
        self.next += 1
        return self.values[self.next - 1]


class _Running:
    """The context of a checkpoint's forward pass, or of its recomputation, which may happen several times."""

    def __init__(self, memory: _Memory, *, is_again: bool) -> None:
        self.memory, self.is_again = memory, is_again
        self.before: list[tuple[_Memory | None, _Scope | None]] = []

    def __enter__(self) -> None:
        self.memory.next = 0 if self.is_again else None
        self.before.append((_now.memory, _now.scope))
        # A checkpoint's parts are not made again one by one.
        _now.memory, _now.scope = self.memory, None

    def __exit__(self, *_failure: object) -> None:
        _now.memory, _now.scope = self.before.pop()


def _checkpoint(function: Callable[..., Any], *inputs: Any, draws: bool) -> Any:
    if torch.compiler.is_compiling():  # which takes no contexts but torch's own
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)

    def contexts() -> tuple[Any, Any]:
        memory = _Memory()
        return _Running(memory, is_again=False), _Running(memory, is_again=True)

    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)


class _Scope(saved_tensors_hooks):
    """The forward pass of a layer: finds saved tensors that are results of :func:`remade`."""

    def __init__(self, how: Recompute, draws: bool) -> None:
        super().__init__(self.pack, _unpack)
        self.how, self.draws = how, draws
        # A weak reference keeps a storage's address from being used again, though not its memory.
        self.results: dict[StorageWeakRef, tuple[_Part, int]] = {}

    def __enter__(self) -> None:
        assert _now.scope is None, "a layer inside a layer"
        super().__enter__()
        _now.scope = self

    def __exit__(self, *failure: object) -> None:
        _now.scope = None
        self.results.clear()
        super().__exit__(*failure)

    def find(self, x: Tensor) -> "tuple[_Part, int] | None":
        """Returns the part that made a tensor's storage, and which of its results that is."""
        if type(x) not in (Tensor, nn.Parameter):
            return None
        return self.results.get(StorageWeakRef(x.untyped_storage()))

    def pack(self, x: Tensor) -> Any:
        """Returns what is kept in place of a tensor."""
        found = self.find(x)
        if found is None or x.dtype != found[0].dtypes[found[1]]:
            return x.detach() if x.requires_grad else x
        part, place = found
        return part.note(place, (x.size(), x.stride(), int(x.storage_offset())))

    def run(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Runs a part, whose results are found from here on."""
        part = _Part(function, [self.pack(x) if isinstance(x, Tensor) else x for x in inputs])
        part.wants = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
        _now.scope = None  # a part's parts are not made again one by one
        try:
            with saved_tensors_hooks(part.note_of_saved, _unpack):
                results = function(*inputs)
        finally:
            _now.scope = self
        own = {StorageWeakRef(x.untyped_storage()) for x in inputs if isinstance(x, Tensor)}
        for place, result in enumerate(_as_tuple(results)):
            part.dtypes.append(result.dtype)
            storage = StorageWeakRef(result.untyped_storage())
            if storage not in own:  # such as a cast to the type that it has
                self.results[storage] = (part, place)
        return results


Layout = tuple[torch.Size, tuple[int, ...], int]
"""Size, strides and offset of a view."""


class _Part:
    """A function whose results, and what autograd saves inside it, are made again."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.wants: list[bool] = []
        """Of each input: does it want a gradient?"""
        self.dtypes: list[torch.dtype] = []
        self.saved = 0
        self.uses: collections.Counter[int] = collections.Counter()
        """Notes of each tensor: results count from 0 up, those saved inside from -1 down."""
        self.made: dict[int, Tensor] = {}
        self.left: collections.Counter[int] = collections.Counter()
        """Notes whose tensors have not been taken since they were made."""
        self.autocasts = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        }

    def note(self, place: int, layout: Layout | None) -> "_Note":
        """Returns a note of a tensor, which stands for it until the backward pass."""
        self.uses[place] += 1
        return _Note(self, place, layout)

    def note_of_saved(self, _: Tensor) -> "_Note":
        """Returns a note of the next tensor that autograd saves inside the function."""
        self.saved += 1
        return self.note(-self.saved, None)

    def take(self, place: int) -> Tensor:
        """Returns a tensor, and forgets it after the last of its notes."""
        if place not in self.made:
            self.made, self.left = self._make(), self.uses.copy()
        self.left[place] -= 1
        return self.made[place] if self.left[place] else self.made.pop(place)

    def _make(self) -> dict[int, Tensor]:
        made: dict[int, Tensor] = {}
        saved = 0

        def pack(x: Tensor) -> None:
            nonlocal saved
            saved += 1
            made[-saved] = x.detach()

        inputs = [_unpack(x) if isinstance(x, Tensor | _Note) else x for x in self.inputs]
        inputs = [
            x.detach().requires_grad_(wants) if isinstance(x, Tensor) else x
            for x, wants in zip(inputs, self.wants, strict=True)
        ]
        with contextlib.ExitStack() as contexts:
            for kind, (enabled, dtype) in self.autocasts.items():
                contexts.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            contexts.enter_context(torch.enable_grad())
            contexts.enter_context(saved_tensors_hooks(pack, _unpack))
            results = _as_tuple(self.function(*inputs))
        made |= {place: result.detach() for place, result in enumerate(results)}
        assert saved == self.saved, "a part has saved other tensors than in the forward pass"
        return {place: tensor for place, tensor in made.items() if self.uses[place]}


class _Note:
    """Stands for a tensor, or a view of it, that a part can make again."""

    __slots__ = ("layout", "part", "place")

    def __init__(self, part: _Part, place: int, layout: Layout | None) -> None:
        self.part, self.place, self.layout = part, place, layout

    def tensor(self) -> Tensor:
        """Returns the tensor."""
        tensor = self.part.take(self.place)
        return tensor if self.layout is None else tensor.as_strided(*self.layout)


def _unpack(kept: Any) -> Any:
    return kept.tensor() if isinstance(kept, _Note) else kept


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@dataclass
class _Now:
    """The forward pass that is running."""

    scope: _Scope | None = None
    """Of a layer that is made again in part."""
    memory: _Memory | None = None
    """Of a checkpoint, also while it is recomputed."""


_now = _Now()
