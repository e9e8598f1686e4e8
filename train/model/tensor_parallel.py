"""Tensor parallelism: the ranks of a group share each sequence, and the products of dense weights.

As in Megatron-LM with sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2). A rank
has one of N equal parts of each sequence. Norms, routers, experts, embeddings and losses work on this part:
there the ranks of a group are what any other ranks are, each token is sent to its experts once, and a
gradient is the mean over all ranks. Attention and dense feed-forward layers begin with a product that is
split by columns: each rank gathers the tokens of whole sequences, and computes its share of the outputs. They
end with one that is split by rows: each rank has its share of the inputs, and the partial sums of all ranks
go to those whose tokens they are of, and are added up there in fp32. The backward pass gathers and sums in
the other places, and gathers a product's input again, so that only a rank's own part is kept.

``Wqkv`` has queries, keys and values in one weight, whose rows are split evenly whatever they are of. So
that checkpoints know no order but the usual one, it is the heads, results of the product, that then change
places (:meth:`TensorGroup.exchange_heads`), a share of 1 / N of what was gathered.

The loss of a rank is that of its tokens, so the gradient of a split weight is the sum over a group where
FSDP2 expects a mean: it is divided by N here. In evaluation each rank has sequences of its own, of whatever
length, and gathers whole weights.

Shapes: B sequences, S tokens of a whole sequence, O = S / N tokens of this rank, D model width, F width of
what is split, M heads of all kinds, R width of a head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import functional

from train.model.context import Context


class TensorGroup(Context):
    """The ranks that share sequences and dense weights, as one of them sees them.

    Args:
        group: the ranks, N.
    """

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)

    def places(self, length: int, device: torch.device) -> Tensor:
        """Returns the places of this rank's tokens in a sequence of ``length``: int64 [O]."""
        return torch.arange(length, device=device).view(self.ranks, -1)[self.rank]

    def part(self, x_BS: Tensor) -> Tensor:
        """Returns this rank's tokens of whole sequences, [B, O]."""
        return x_BS.chunk(self.ranks, dim=1)[self.rank].contiguous()

    def whole_sequences(self, x_BOD: Tensor) -> Tensor:
        """Returns all ranks' tokens, [B, S, D]; collective, without gradient."""
        parts = x_BOD.new_empty(self.ranks, *x_BOD.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), x_BOD.contiguous(), group=self.group)
        return parts.movedim(0, 1).flatten(1, 2)

    def sum_to_parts(self, x_BSD: Tensor) -> Tensor:
        """Returns the sum of all ranks' values for this rank's tokens, [B, O, D]; collective, no gradient."""
        leaving = x_BSD.unflatten(1, (self.ranks, -1)).movedim(1, 0).contiguous()
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.group)
        return arriving.sum(dim=0, dtype=torch.promote_types(x_BSD.dtype, torch.float32)).to(x_BSD.dtype)

    def whole_weight(self, weight: Tensor, dimension: int) -> Tensor:
        """Returns a weight of which each rank holds a part; collective, without gradient."""
        parts = weight.new_empty(self.ranks, *weight.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), weight.detach().contiguous(), group=self.group)
        return parts.movedim(0, dimension).flatten(dimension, dimension + 1)

    def exchange_heads(self, qkv_BSMR: Tensor, kinds: Sequence[int]) -> Tensor:
        """Sends heads to the ranks that attend with them.

        Args:
            qkv_BSMR: this rank's 1 / N of the heads of all kinds, in order.
            kinds: heads of each kind, in order; of each a rank gets its 1 / N.

        Returns:
            The same number of heads, [B, S, M, R], of one kind after the other.
        """
        result: Tensor = _ExchangeHeads.apply(qkv_BSMR, self, tuple(kinds))
        return result


class ColumnLinear(nn.Linear):
    """A product that a group of ranks splits by its outputs, if there is one; then it has no bias."""

    group: TensorGroup | None = None

    @property
    def sharing(self) -> TensorGroup | None:
        """The ranks that split the product: none in evaluation."""
        return self.group if self.training else None

    def forward(self, input: Tensor) -> Tensor:
        """Returns this rank's share of the outputs, of whole sequences; where nothing is split, all."""
        return column_products(input, self)[0]


class RowLinear(nn.Linear):
    """A product that a group of ranks splits by its inputs, if there is one; then it has no bias."""

    group: TensorGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output for this rank's tokens."""
        if self.group is None:
            return super().forward(input)
        weight = local_part(self.weight)
        if not self.training:
            return functional.linear(input, self.group.whole_weight(weight, 1))
        result: Tensor = _Rows.apply(input, weight, self.group)
        return result


def column_products(x: Tensor, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Returns the products of several layers with one input, whose tokens are gathered once."""
    group = layers[0].group
    if group is None:
        return tuple(functional.linear(x, layer.weight, layer.bias) for layer in layers)
    weights = [local_part(layer.weight) for layer in layers]
    if not layers[0].training:
        return tuple(functional.linear(x, group.whole_weight(weight, 0)) for weight in weights)
    results: tuple[Tensor, ...] = _Columns.apply(x, group, *weights)
    return results


def local_part(weight: Tensor) -> Tensor:
    """Returns the part of a weight that this rank multiplies with."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class _Columns(torch.autograd.Function):
    """Gathers tokens and multiplies; keeps only this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x_BOD: Tensor, group: TensorGroup, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.dtypes = group, [x_BOD.dtype, *(weight.dtype for weight in weights)]
        x_BOD, *cast = _as_multiplied(x_BOD, *weights)
        ctx.save_for_backward(x_BOD, *cast)
        x_BSD = group.whole_sequences(x_BOD)
        return tuple(functional.linear(x_BSD, weight) for weight in cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BOD, *weights = ctx.saved_tensors
        group: TensorGroup = ctx.group
        x_TD = group.whole_sequences(x_BOD).flatten(0, 1)
        of_weights = [
            ((grad_BSF.flatten(0, 1).t() @ x_TD) / group.ranks).to(dtype)
            for grad_BSF, dtype in zip(grads, ctx.dtypes[1:], strict=True)
        ]
        del x_TD
        of_x = grads[0] @ weights[0]
        for grad_BSF, weight in zip(grads[1:], weights[1:], strict=True):
            of_x += grad_BSF @ weight
        return group.sum_to_parts(of_x).to(ctx.dtypes[0]), None, *of_weights


class _Rows(torch.autograd.Function):
    """Multiplies a share of the inputs, and sends the partial sums where the tokens are."""

    @staticmethod
    def forward(ctx: Any, x_BSF: Tensor, weight: Tensor, group: TensorGroup) -> Tensor:
        ctx.group, ctx.dtypes = group, (x_BSF.dtype, weight.dtype)
        x_BSF, weight = _as_multiplied(x_BSF, weight)
        ctx.save_for_backward(x_BSF, weight)
        return group.sum_to_parts(functional.linear(x_BSF, weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BSF, weight = ctx.saved_tensors
        group: TensorGroup = ctx.group
        grad_BSD = group.whole_sequences(grads[0].to(weight.dtype))
        of_weight = (grad_BSD.flatten(0, 1).t() @ x_BSF.flatten(0, 1)) / group.ranks
        return (grad_BSD @ weight).to(ctx.dtypes[0]), of_weight.to(ctx.dtypes[1]), None


class _ExchangeHeads(torch.autograd.Function):
    """Sends heads to other ranks, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, qkv_BSMR: Tensor, group: TensorGroup, kinds: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.kinds = group, kinds
        order, sent, received = _routes(kinds, group.ranks, group.rank)
        heads = qkv_BSMR.unbind(dim=2)
        # Stacked, not indexed: the host would wait while it copies an index to a GPU.
        leaving = torch.stack([heads[place] for place in order])
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, list(received), list(sent), group=group.group)
        return arriving.movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        group: TensorGroup = ctx.group
        order, sent, received = _routes(ctx.kinds, group.ranks, group.rank)
        leaving = grads[0].movedim(2, 0).contiguous()
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, list(sent), list(received), group=group.group)
        heads = dict(zip(order, arriving.unbind(), strict=True))
        return torch.stack([heads[place] for place in range(len(order))], dim=2), None, None


@functools.lru_cache(maxsize=16)
def _routes(
    kinds: tuple[int, ...], ranks: int, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the order in which a rank sends its heads, how many to each rank, and how many from each.

    A rank's heads arrive by the ranks that had them, so in the order of all heads.
    """
    attends = [place * ranks // count for count in kinds for place in range(count)]
    each = len(attends) // ranks
    own = attends[rank * each : (rank + 1) * each]
    order = tuple(sorted(range(each), key=own.__getitem__))
    sent = tuple(own.count(other) for other in range(ranks))
    received = tuple(attends[other * each : (other + 1) * each].count(rank) for other in range(ranks))
    return order, sent, received


def _as_multiplied(*operands: Tensor) -> list[Tensor]:
    """Returns operands in autocast's precision, if it is on."""
    device = operands[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else operands[0].dtype
    return [operand.to(dtype) for operand in operands]
