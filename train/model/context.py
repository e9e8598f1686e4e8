"""Context parallelism: the ranks of a group share each sequence, and gather keys and values for attention.

As in Llama 3 (2024, arXiv 2407.21783, section 3.3.2): a sequence is cut into 2 C chunks, and rank r of C
takes chunks r and 2 C - 1 - r, one from either end, so that all have equally many visible pairs of tokens.
Each rank attends from its own tokens to the whole sequence, whose keys and values it gathers in one
collective: they are few where query heads share them. So any mask of documents and any number of heads will
do. In the backward pass each rank's gradients of all keys and values go back to those whose they are, in the
precision that they have, and are summed there in fp32. Outside attention tokens are independent, and to
weights the ranks of a group are what any other ranks are.

Shapes: B sequences, S tokens of a whole sequence, O = S / C tokens of this rank, G key-value heads, R and V
widths of a head of keys and of values.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Context:
    """The ranks that share sequences, as one of them sees them.

    Args:
        group: the ranks, C.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def places(self, length: int, device: torch.device) -> Tensor:
        """Returns the places of this rank's tokens in a sequence of ``length``, ascending: int64 [O]."""
        chunks = torch.arange(length, device=device).view(2 * self.ranks, -1)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]])

    def part(self, x_BS: Tensor) -> Tensor:
        """Returns this rank's tokens of whole sequences, [B, O]."""
        chunks = x_BS.chunk(2 * self.ranks, dim=1)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim=1)

    def gather(self, k_BOGR: Tensor, v_BOGV: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of whole sequences, [B, S, G, R] and [B, S, G, V]; collective."""
        whole: tuple[Tensor, Tensor] = _Gather.apply(k_BOGR, v_BOGV, self)
        return whole

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of all ranks' tensors; collective, without gradient."""
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total


class _Gather(torch.autograd.Function):
    """Gathers keys and values; sums the gradients that all ranks have of them."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        ctx.context, ctx.width = context, k.shape[-1]
        own = torch.cat([k, v], dim=-1)
        parts = own.new_empty(context.ranks, *own.shape)
        dist.all_gather_into_tensor(parts.view(-1, *own.shape[1:]), own, group=context.group)
        k_parts, v_parts = parts.split([k.shape[-1], v.shape[-1]], dim=-1)
        return _in_order(k_parts), _in_order(v_parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        context: Context = ctx.context
        leaving = torch.cat([_by_rank(grad, context.ranks) for grad in grads], dim=-1)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=context.group)
        in_fp32 = torch.promote_types(arriving.dtype, torch.float32)
        total = arriving.sum(dim=0, dtype=in_fp32).to(arriving.dtype)
        return total[..., : ctx.width].contiguous(), total[..., ctx.width :].contiguous(), None


def _in_order(parts_CBOGR: Tensor) -> Tensor:
    """Puts the ranks' tokens together to whole sequences, [B, S, G, R]."""
    early, late = parts_CBOGR.chunk(2, dim=2)
    return torch.cat([*early.unbind(), *late.flip(0).unbind()], dim=1)


def _by_rank(x_BSGR: Tensor, ranks: int) -> Tensor:
    """The inverse of :func:`_in_order`: each rank's tokens, [C, B, O, G, R]."""
    early, late = x_BSGR.unflatten(1, (2, ranks, -1)).unbind(dim=1)
    return torch.cat([early, late.flip(1)], dim=2).transpose(0, 1)
