"""The matrices that Muon orthogonalises: whole ones, and the rank that does each. Needs no torch.

A weight may be a stack of matrices: all experts of a layer, or queries, keys and values. Its rows are split
over the ranks of a group without regard to where one matrix ends. In each round every rank orthogonalises
matrices of one shape, whose rows the others send it and get back. A matrix that lies within one rank's rows
stays there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from train.recipe.schema import Model

LEFT_TO_ADAMW = (".wte.", "lm_head.", ".router.")
"""Parts of names of matrices that AdamW updates. Embeddings and the output projection: each row belongs to a
token, and most rows have no gradient in a step (Jordan et al. 2024; Liu et al. 2025, section 2.2). Routers:
each row is an expert's score, as the output projection's is a token's; Marin's mixtures leave them to Adam
(marin-community/marin#5719), while GLM-4.5 orthogonalises them (2025, section 2.4)."""
MOST_ELEMENTS = 2**26
"""Elements that a rank orthogonalises at once, if they are of several matrices: 128 MiB in bf16."""


@dataclass(frozen=True)
class Stack:
    """Matrices on top of each other, whose rows the ranks of a group share."""

    rows: tuple[int, ...]
    """Rows of each matrix."""
    columns: int

    def bounds(self, ranks: int, rank: int) -> tuple[int, int]:
        """Returns a rank's first row and the row after its last, like ``torch.chunk``."""
        whole = sum(self.rows)
        share = -(-whole // ranks)
        return min(rank * share, whole), min((rank + 1) * share, whole)


class Matrix(NamedTuple):
    """One matrix of a stack."""

    stack: int
    """Index of the stack."""
    first: int
    """Its first row in the stack."""
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Round:
    """Matrices of one shape that the ranks orthogonalise at the same time."""

    owned: tuple[tuple[Matrix, ...], ...]
    """Those of each rank."""
    travels: bool
    """Whether any rank needs rows of another."""


def is_orthogonalised(name: str, shape: Sequence[int]) -> bool:
    """Returns whether Muon updates a weight; AdamW updates all others, such as a gate of one row."""
    return len(shape) == 2 and min(shape) > 1 and not any(part in f".{name}" for part in LEFT_TO_ADAMW)


def stacked_rows(model: Model, name: str, rows: int, degree: int = 1) -> tuple[int, ...]:
    """Returns the rows of each matrix that a weight consists of.

    Args:
        model: the weight's decoder.
        name: the weight's name.
        rows: its rows.
        degree: ranks over which whole experts are split; the stack is that of one of them.
    """
    if ".experts." in name:
        assert model.moe is not None
        return (rows // model.moe.experts,) * (model.moe.experts // degree)
    if name.endswith(".Wqkv.weight"):
        head = rows // (model.n_heads + 2 * model.n_kv_heads)
        return model.n_heads * head, model.n_kv_heads * head, model.n_kv_heads * head
    return (rows,)


def rounds(stacks: Sequence[Stack], ranks: int, most_elements: int = MOST_ELEMENTS) -> list[Round]:
    """Returns the rounds in which the ranks of a group orthogonalise all matrices of its stacks."""
    staying: dict[tuple[int, int], list[list[Matrix]]] = {}
    travelling: dict[tuple[int, int], list[Matrix]] = {}
    for index, stack in enumerate(stacks):
        holders = [_holder(stack, matrix, ranks) for matrix in _matrices(index, stack)]
        for matrix, holder in zip(_matrices(index, stack), holders, strict=True):
            shape = (matrix.rows, matrix.columns)
            # Only if all of them stay is the work shared evenly.
            if None in holders:
                travelling.setdefault(shape, []).append(matrix)
            else:
                assert holder is not None
                staying.setdefault(shape, [[] for _ in range(ranks)])[holder].append(matrix)
    found = []
    for shape, held in staying.items():
        at_once = max(1, most_elements // (shape[0] * shape[1]))
        for first in range(0, max(map(len, held)), at_once):
            owned = tuple(tuple(matrices[first : first + at_once]) for matrices in held)
            found.append(Round(owned, travels=False))
    for shape, matrices in travelling.items():
        at_once = max(1, most_elements // (shape[0] * shape[1]))
        for first in range(0, len(matrices), ranks * at_once):
            part = matrices[first : first + ranks * at_once]
            found.append(Round(tuple(tuple(part[rank::ranks]) for rank in range(ranks)), travels=True))
    return found


def _matrices(index: int, stack: Stack) -> Iterator[Matrix]:
    first = 0
    for rows in stack.rows:
        yield Matrix(index, first, rows, stack.columns)
        first += rows


def _holder(stack: Stack, matrix: Matrix, ranks: int) -> int | None:
    """The rank that holds all rows of a matrix; None if several share it."""
    share = stack.bounds(ranks, 0)[1]
    first, last = matrix.first // share, (matrix.first + matrix.rows - 1) // share
    return first if first == last else None
