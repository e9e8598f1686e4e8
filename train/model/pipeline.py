"""A pipeline's ranks: which stage this one is, and how activations and gradients travel between stages.

torch's own stages (``torch.distributed.pipelining``) send every output of a stage to the next and start each
backward pass from gradients of these only. Here every stage has losses of its own, those of its routers, and
a loss for each microbatch's forward pass that ranks outside the pipeline take part in: so sends, receives and
the order of passes (:mod:`train.recipe.pipeline`) are ours.

Shapes: B sequences of a microbatch, S tokens per sequence, D model width.
"""

# ruff: noqa: N815  (shape suffixes)

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

FORWARD, BACKWARD = 0, 1


class Receipt(NamedTuple):
    """A tensor on its way here."""

    work: dist.Work
    x_BSD: Tensor

    def wait(self) -> Tensor:
        """Waits for the tensor."""
        self.work.wait()
        return self.x_BSD


class Pipeline:
    """The stages of a pipeline. Each of them calls the same methods, in an order that fits the others'.

    Sends return at once, and their tensors are kept until they have arrived. Each direction has a group of
    its own, so that of two ranks one only ever sends in it, and NCCL cannot wait in a circle. With several
    chunks the way from the last stage to the first has two more.

    Args:
        links: groups of the pipeline's ranks, by stage: two, or four with several chunks.
        peers: all ranks with this stage, in every replica.
        chunks: parts of a stage, which are run in turn.
        ends: the ranks of the first and of the last stage; None: this one's is between.
    """

    def __init__(
        self,
        links: Sequence[dist.ProcessGroup],
        peers: dist.ProcessGroup,
        chunks: int = 1,
        ends: dist.ProcessGroup | None = None,
    ) -> None:
        self._links, self.peers, self.chunks, self.ends = links, peers, chunks, ends
        self.group = links[FORWARD]
        self.ranks = dist.get_process_group_ranks(self.group)
        self.stage, self.stages = dist.get_rank(self.group), len(self.ranks)
        self._sent: list[tuple[dist.Work, Tensor]] = []

    @property
    def is_last(self) -> bool:
        """Is this the last stage, which computes the loss?"""
        return self.stage == self.stages - 1

    def send(self, x_BSD: Tensor, direction: int) -> None:
        """Sends activations (:data:`FORWARD`) to the next stage, or gradients to the one before."""
        to = (self.stage + (1 if direction == FORWARD else -1)) % self.stages
        x_BSD = x_BSD.detach().contiguous()
        work = dist.isend(x_BSD, self.ranks[to], group=self._link(self.stage, direction))
        assert work is not None
        self._sent = [(each, kept) for each, kept in self._sent if not each.is_completed()]
        self._sent.append((work, x_BSD))

    def receive(self, shape: Sequence[int], like: Tensor, direction: int) -> Receipt:
        """Begins to receive activations of the stage before, or gradients of the next one.

        Args:
            shape: B, S and D.
            like: a tensor of their precision and device.
            direction: in which they travel.
        """
        source = (self.stage - (1 if direction == FORWARD else -1)) % self.stages
        x_BSD = like.new_empty(shape)
        work = dist.irecv(x_BSD, self.ranks[source], group=self._link(source, direction))
        assert work is not None
        return Receipt(work, x_BSD)

    def share(self, x: Tensor) -> list[Tensor]:
        """Returns the tensors of this pipeline's ranks by stage, of two dimensions and whatever sizes."""
        shapes = x.new_zeros((self.stages, 2))
        shapes[self.stage] = torch.tensor(x.shape)
        dist.all_reduce(shapes, group=self.group)
        found = []
        for stage, shape in enumerate(shapes.tolist()):
            found.append(x.contiguous() if stage == self.stage else x.new_empty([int(n) for n in shape]))
            dist.broadcast(found[-1], self.ranks[stage], group=self.group)
        return found

    def bring_back(self, x: Tensor | None, stage: int, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """Sends what the last stage has to a stage, which returns it; the others return None.

        Args:
            x: on the last stage; None: on others.
            stage: that gets it.
            shape: of it.
            like: a tensor of its precision and device.
        """
        link = self._links[BACKWARD]  # in which later stages send to earlier ones
        if stage == self.stages - 1:
            return x
        if x is not None:
            dist.send(x.contiguous(), self.ranks[stage], group=link)
        elif stage == self.stage:
            x = like.new_empty(shape)
            dist.recv(x, self.ranks[-1], group=link)
            return x
        return None

    def finish(self) -> None:
        """Waits until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _link(self, source: int, direction: int) -> dist.ProcessGroup:
        is_round = source == (self.stages - 1 if direction == FORWARD else 0)
        return self._links[direction + 2 * is_round]
