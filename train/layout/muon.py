"""Muon: momentum whose matrices are orthogonalised, and AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); scaled to the size of AdamW's updates and decayed like
them (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that AdamW's learning rate serves both.

Each matrix is orthogonalised whole, by one rank: every expert, and queries, keys and values, by themselves.
The ranks that share a weight's rows send them to the rank whose turn it is, and get the result back
(:mod:`train.recipe.matrices`): two all-to-alls a round, in which a rank sends what it holds once, and as much
of the results, in bf16 on a GPU. Replicas repeat each other's work. All ranks hold momentum of their own rows
only.

Shapes: B matrices, R rows, C columns.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from train.recipe.matrices import Matrix, Stack, rounds

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial of a Newton-Schulz step; five take every singular value above a thousandth of the
norm to about 0.7 to 1.2 (Jordan et al. 2024)."""
EPS = 1e-7
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates at a rate of 1 (Liu et al. 2025, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups with ``orthogonal``, AdamW for the others.

    Args:
        groups: parameter groups; each has ``orthogonal``, and its parameters are on one mesh.
        stacks: of each parameter with ``orthogonal``, the matrices that it is a stack of and the group of
            ranks that share its rows (None: this rank has all).
        lr: learning rate.
        momentum: decay rate of the momentum.
        nesterov: look one step ahead.
        steps: Newton-Schulz steps.
        betas: decay rates of AdamW's moments.
        eps: added to the root of AdamW's second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        stacks: dict[Tensor, tuple[Stack, dist.ProcessGroup | None]],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        steps: int,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.stacks, self.steps = stacks, steps
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        # As AdamW's does, it keeps the count of steps on the weights' device when a state is loaded.
        super().__init__(groups, defaults | {"weight_decay": 0.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            update = self._step_muon if group["orthogonal"] else self._step_adamw
            update(group, parameters)
        return loss

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = _shards(parameters)
        gradients = _shards(p.grad for p in parameters)
        momenta = _shards(self.state[p]["momentum_buffer"] for p in parameters)
        # Scaled by 1 - momentum, which orthogonalising undoes.
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        rate = group["lr"]
        if not rate:  # Nothing moves, as in the step of zeros by which torch fills in an optimizer's state.
            return
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        ahead = group["momentum"] if group["nesterov"] else 1.0

        dtype = torch.bfloat16 if weights[0].is_cuda else weights[0].dtype

        def read(held: Held) -> Tensor:
            stack, rows = held.matrix.stack, held.rows
            return gradients[stack][rows].lerp(momenta[stack][rows], ahead).to(dtype)

        def write(held: Held, direction_RC: Tensor) -> None:
            scale = ADAMW_RMS * math.sqrt(max(held.matrix.rows, held.matrix.columns))
            weights[held.matrix.stack][held.rows].add_(direction_RC, alpha=-rate * scale)

        stacks, process_groups = zip(*(self.stacks[p] for p in parameters), strict=True)
        empty = weights[0].new_empty(0, dtype=dtype)
        update_matrices(stacks, process_groups[0], read, write, empty, self.steps)


class Held(NamedTuple):
    """Rows of a matrix that one rank holds."""

    matrix: Matrix
    rows: slice
    """Their place in the rank's part of the stack."""
    within: slice
    """Their place in the matrix."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return (self.rows.stop - self.rows.start) * self.matrix.columns


class RankRound(NamedTuple):
    """A round as one rank sees it."""

    own: tuple[Matrix, ...]
    """Matrices that it orthogonalises."""
    sent: list[list[Held]]
    """Of its rows, those that each rank needs."""
    received: list[list[Held]]
    """Of its matrices, the rows of each rank."""
    travels: bool


def update_matrices(
    stacks: Sequence[Stack],
    group: dist.ProcessGroup | None,
    read: Callable[[Held], Tensor],
    write: Callable[[Held, Tensor], None],
    empty: Tensor,
    steps: int,
) -> None:
    """Orthogonalises every matrix of stacks whose rows a group of ranks shares; each rank of it calls this.

    Args:
        stacks: the stacks, the same on every rank.
        group: the ranks, in the order in which they hold the rows; None: this rank has all.
        read: returns rows that this rank holds.
        write: takes the same rows, orthogonalised.
        empty: no elements, of the precision and on the device of the others.
        steps: Newton-Schulz steps.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    for turn in turns(tuple(stacks), ranks, rank):
        flat = torch.cat([empty, *(read(held).flatten() for part in turn.sent for held in part)])
        if turn.travels:
            flat = _exchanged(flat, turn.received, turn.sent, group)
        if turn.own:
            flat = _orthogonalized(turn, flat, steps)
        if turn.travels:
            flat = _exchanged(flat, turn.sent, turn.received, group)
        parts = [held for part in turn.sent for held in part]
        for held, direction in zip(parts, flat.split([held.elements for held in parts]), strict=True):
            write(held, direction.view(-1, held.matrix.columns))


def orthogonalize(x_BRC: Tensor, steps: int = 5) -> Tensor:
    """Takes the singular values of matrices to about 1, by Newton-Schulz steps in their own precision.

    Args:
        x_BRC: B matrices; one of zeros stays as it is.
        steps: number of steps.
    """
    a, b, c = COEFFICIENTS
    is_tall = x_BRC.shape[1] > x_BRC.shape[2]
    x = x_BRC.mT if is_tall else x_BRC
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norms.clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


@functools.lru_cache(maxsize=16)
def turns(stacks: tuple[Stack, ...], ranks: int, rank: int) -> list[RankRound]:
    """Returns the rounds of a rank, without those in which it has nothing to do."""
    bounds = [[stack.bounds(ranks, each) for each in range(ranks)] for stack in stacks]

    def held(matrices: Iterable[Matrix], rank: int) -> list[Held]:
        found = []
        for matrix in matrices:
            start, end = bounds[matrix.stack][rank]
            first, last = max(start, matrix.first), min(end, matrix.first + matrix.rows)
            if first < last:
                rows, within = ((first - at, last - at) for at in (start, matrix.first))
                found.append(Held(matrix, slice(*rows), slice(*within)))
        return found

    return [
        RankRound(
            own=each.owned[rank],
            sent=[held(matrices, rank) for matrices in each.owned],
            received=[held(each.owned[rank], source) for source in range(ranks)],
            travels=each.travels,
        )
        for each in rounds(stacks, ranks)
        if each.travels or each.owned[rank]
    ]


def _exchanged(
    flat: Tensor, received: list[list[Held]], sent: list[list[Held]], group: dist.ProcessGroup | None
) -> Tensor:
    """Sends its part to each rank, and returns what they send."""
    receives, sends = ([sum(held.elements for held in part) for part in parts] for parts in (received, sent))
    there = flat.new_empty(sum(receives))
    dist.all_to_all_single(there, flat, receives, sends, group=group)
    return there


def _orthogonalized(turn: RankRound, flat: Tensor, steps: int) -> Tensor:
    """Puts a rank's matrices together from the rows of all ranks, and takes the results apart again."""
    rows, columns = turn.own[0].rows, turn.own[0].columns
    matrices_BRC = flat.new_empty(len(turn.own), rows, columns)
    places = {matrix: place for place, matrix in enumerate(turn.own)}
    parts = [held for part in turn.received for held in part]
    for held, piece in zip(parts, flat.split([held.elements for held in parts]), strict=True):
        matrices_BRC[places[held.matrix], held.within] = piece.view(-1, columns)
    matrices_BRC = orthogonalize(matrices_BRC, steps)
    return torch.cat([matrices_BRC[places[held.matrix], held.within].flatten() for held in parts])


def _shards(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """This rank's parts."""
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors if each is not None]
