"""The exchange of tokens between the ranks that share a layer's experts: an all-to-all there and one back.

It takes the place of MegaBlocks' own, which waits for each exchange where it asks for it. Here rows are sent
in one place and received in another, and so are their gradients: whatever a layer computes between `send` and
`receive`, autograd computes backward between the receiver's gradient and the sender's, since it runs last
what was made first. Rows travel in the precision that the experts compute in, bf16 under autocast, or
to their experts in fp8 (:mod:`train.model.packed_rows`).

The host waits once for each exchange: for the numbers of rows, of this rank's and of the others together. If
a layer is recomputed, it repeats the exchange with the numbers of its forward pass, without waiting.

Shapes: T tokens, K experts per token, R = T x K rows sorted by expert, N rows received, D model, E experts,
P ranks of the group, Q = E / P experts of a rank.
"""

# ruff: noqa: N815  (shape suffixes)

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.model import megablocks_ops
from train.model.packed_rows import packed, unpacked
from train.model.recompute import kept

megablocks_ops.install()

from megablocks import ops  # noqa: E402  (needs the modules that install provides)
from megablocks.layers.dmoe import ParallelDroplessMLP  # noqa: E402


class AllToAll:
    """Rows on their way between the ranks of a group; in the backward pass their gradients, on the way back.

    Args:
        group: the ranks.
        sent: rows for each rank, in the order of the ranks.
        received: rows from each rank.
        packs: send rows in fp8, their gradients as they are.
    """

    def __init__(
        self, group: dist.ProcessGroup, sent: list[int], received: list[int], *, packs: bool = False
    ) -> None:
        self.group, self.sent, self.received, self.packs = group, sent, received, packs
        self._dtype: torch.dtype | None = None
        """Of the rows that are on their way in fp8; None: they are sent as they are."""
        self._in_flight: tuple[Tensor, Tensor, dist.Work] | None = None
        """The rows that arrive, those sent, which no one may overwrite until then, and torch's handle."""

    def send(self, rows_RD: Tensor) -> Tensor:
        """Starts to send rows, by rank; returns what :meth:`receive` takes, for autograd's order."""
        result: Tensor = _Send.apply(rows_RD, self)
        return result

    def receive(self, sent_RD: Tensor) -> Tensor:
        """Returns the rows that the ranks have sent to this one, once they are there."""
        result: Tensor = _Receive.apply(sent_RD, self)
        return result

    def start(self, rows: Tensor, *, is_back: bool) -> Tensor:
        """Starts to send rows or, back, gradients; returns the buffer that they arrive in."""
        leaving, arriving = (self.received, self.sent) if is_back else (self.sent, self.received)
        self._dtype = rows.dtype if self.packs and not is_back else None
        if self._dtype is not None:
            rows = packed(rows)
        buffer = rows.new_empty(sum(arriving), *rows.shape[1:])
        work = dist.all_to_all_single(
            buffer,
            rows,
            output_split_sizes=arriving,
            input_split_sizes=leaving,
            group=self.group,
            async_op=True,
        )
        assert self._in_flight is None and work is not None
        self._in_flight = buffer, rows, work
        return buffer

    def finish(self) -> Tensor:
        """Returns the buffer once it is full; on a GPU the stream waits for that, not the host."""
        assert self._in_flight is not None, "nothing was sent"
        buffer, _, work = self._in_flight
        work.wait()
        self._in_flight = None  # A handle of NCCL's would keep what it sent in memory.
        return buffer if self._dtype is None else unpacked(buffer, self._dtype)


class _Send(torch.autograd.Function):
    """The identity, at which rows leave and their gradients arrive."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.start(rows, is_back=False)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *_in_flight: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class _Receive(torch.autograd.Function):
    """At which rows arrive and their gradients leave: what it returns in the backward pass is not there yet.

    Only :class:`_Send` may read it.
    """

    @staticmethod
    def forward(ctx: Any, _sent: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.exchange.start(grads[0].contiguous(), is_back=True), None


class RowCounts:
    """Numbers of rows that ranks send each other: on their way at first, then known to the host.

    Args:
        tokens_E: int32: rows of this rank for each expert of the group's.
        group: the ranks.
    """

    def __init__(self, tokens_E: Tensor, group: dist.ProcessGroup) -> None:
        ranks = group.size()
        self._both_2PQ = tokens_E.new_empty(2, ranks, tokens_E.numel() // ranks)
        sent_PQ, self.received_PQ = self._both_2PQ
        sent_PQ.copy_(tokens_E.view_as(sent_PQ))
        self._in_flight = dist.all_to_all_single(self.received_PQ, sent_PQ, group=group, async_op=True)
        self._on_host_2PQ: Tensor | None = None

    def on_host(self) -> Tensor:
        """Returns int32 [2, P, Q]: rows that are sent, and received, by rank and its expert.

        The host waits for them the first time.
        """
        if self._on_host_2PQ is None:
            assert self._in_flight is not None
            self._in_flight.wait()
            self._in_flight = None
            self._on_host_2PQ = self._both_2PQ.cpu()
        return self._on_host_2PQ


class Order(NamedTuple):
    """An order of rows by expert, as MegaBlocks' gather and scatter take it."""

    places_R: Tensor
    """For each sorted row, its place in the unsorted order."""
    experts_R: Tensor
    ends_E: Tensor
    """Where each expert's rows end."""


class Shipment(NamedTuple):
    """Rows of this rank's tokens on their way to their experts, and what their way back needs."""

    rows_RD: Tensor
    """In flight: see :meth:`AllToAll.send`."""
    weights_R: Tensor
    order: Order
    """Of this rank's rows, by expert and so by rank."""
    order_there: Order
    """Of the rows received, by this rank's experts."""
    tokens_Q: Tensor
    """Rows of each of this rank's experts, known to the host."""
    there: AllToAll
    back: AllToAll


class ExchangingExperts(ParallelDroplessMLP):
    """A layer's experts, whose tokens may be sent before they are called.

    Called with what :meth:`send` returned, for one or several parts of a microbatch, they return their
    outputs; called as in MegaBlocks, with a whole microbatch, they send and receive by themselves.
    """

    packs = False
    """Send tokens to their experts in fp8: see :mod:`train.model.packed_rows`."""

    def forward(self, *inputs: Any) -> Any:
        """Returns the output of a microbatch, or a list with the output [T, D] of each shipment."""
        if isinstance(inputs[0], Shipment):
            return self.receive(*inputs)
        return super().forward(*inputs)

    def parallel_forward_once(
        self, x: Tensor, expert_weights: Tensor, top_experts: Tensor
    ) -> tuple[Tensor, None]:
        """Sends a microbatch and receives it at once, in place of MegaBlocks' method of this name."""
        (out_TD,) = self.receive(self.send(x.view(-1, x.shape[-1]), expert_weights, top_experts))
        return out_TD, None

    def send(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Shipment:
        """Sends each token's row to the ranks of its experts."""
        group: dist.ProcessGroup = self.args.expert_parallel_group
        with torch.no_grad():
            *order_of_own, tokens_E = self.indices_and_bins(experts_TK.flatten())
            order = Order(*order_of_own)
            counts = kept(lambda: RowCounts(tokens_E, group))
        rows_RD = ops.gather(x_TD, *order, self.top_k)
        with torch.no_grad():
            on_host_2PQ = counts.on_host()
            sent, received = on_host_2PQ.sum(dim=-1).tolist()
        there = AllToAll(group, sent, received, packs=self.packs)
        back = AllToAll(group, received, sent)
        in_flight_RD = there.send(rows_RD)
        # Only now: a GPU has nothing to do until the host, which has waited, asks it for something.
        with torch.no_grad():
            order_there = self._order_of(counts.received_PQ, sum(received))
            tokens_Q = on_host_2PQ[1].sum(dim=0, dtype=torch.int)
        return Shipment(in_flight_RD, weights_TK.flatten(), order, order_there, tokens_Q, there, back)

    def receive(self, *shipments: Shipment) -> list[Tensor]:
        """Runs this rank's experts on the rows of each shipment, and returns its tokens' outputs, [T, D].

        One comes back while the next is computed.
        """
        on_way_back = []
        for shipment in shipments:
            arrived_ND = shipment.there.receive(shipment.rows_RD)
            out_ND = self.permute_and_compute(
                arrived_ND,
                shipment.tokens_Q,
                shipment.order_there.places_R,
                shipment.order_there.experts_R,
                None,  # weights: each rank applies its own
                shipment.order_there.ends_E,
                -1,  # capacity: none is dropped
                top_k=1,
            )
            on_way_back.append(shipment.back.send(out_ND))
        return [
            self._sum(shipment.back.receive(sent_ND), shipment)
            for shipment, sent_ND in zip(shipments, on_way_back, strict=True)
        ]

    def _sum(self, rows_RD: Tensor, shipment: Shipment) -> Tensor:
        """Sums each token's rows, by their weights."""
        places_R, experts_R, ends_E = shipment.order
        out_TD: Tensor = ops.scatter(rows_RD, places_R, experts_R, shipment.weights_R, ends_E, self.top_k)
        return out_TD

    def _order_of(self, received_PQ: Tensor, rows: int) -> Order:
        """Returns the order by expert of rows that are sorted by the rank that sent them, then by expert."""
        ranks, experts = received_PQ.shape
        experts_E = torch.arange(experts, dtype=torch.int32, device=received_PQ.device).repeat(ranks)
        experts_N = experts_E.repeat_interleave(received_PQ.flatten(), output_size=rows)
        sorted_N, places_N = ops.sort(experts_N, self.sort_end_bit)
        ends_Q = ops.inclusive_cumsum(received_PQ.sum(dim=0, dtype=torch.int), 0)
        return Order(places_N, sorted_N, ends_Q.view(-1))
