"""The exchange of tokens between the ranks that share a layer's experts: an all-to-all there and one back.

It takes the place of MegaBlocks' own, which waits for each exchange where it asks for it. Here rows are sent
in one place and received in another, and so are their gradients: whatever a layer computes between `send` and
`receive`, autograd computes backward between the receiver's gradient and the sender's, since it runs last
what was made first. Rows travel in the precision that the experts compute in, bf16 under autocast, or
to their experts in fp8 (:mod:`train.model.packed_rows`).

The host waits once for each exchange: for the numbers of rows, of this rank's and of the others together. If
a layer is recomputed, it repeats the exchange with the numbers of its forward pass, without waiting.

Where an expert group spans nodes, a row may cross the network once for each node:
:mod:`train.model.node_exchange`.

Shapes: T tokens, K experts per token, R = T x K rows sorted by expert, N rows received, D model, E experts,
P ranks of the group, Q = E / P experts of a rank.
"""

# ruff: noqa: N815  (shape suffixes)

from typing import Any, NamedTuple, Protocol

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


class Delivery(Protocol):
    """Rows of a shipment from the time they are wanted until their outputs are back, step by step.

    Several shipments take each step in turn, so that the rows of one are on their way while another computes.
    """

    order_there: Order
    """Of the rows received, by this rank's experts."""
    tokens_Q: Tensor
    """Rows of each of this rank's experts, known to the host."""

    def pass_on(self) -> None:
        """Sends rows that wait at another rank on to their experts."""

    def arrive(self) -> Tensor:
        """Returns the rows that this rank's experts have been sent, [N, D]."""

    def send_back(self, out_ND: Tensor) -> None:
        """Starts to send back the experts' outputs."""

    def pass_back(self) -> None:
        """Sends outputs that wait at another rank on to their tokens."""

    def outputs(self) -> Tensor:
        """Returns the sum of each token's outputs by their weights, [T, D]."""


class Shipment(NamedTuple):
    """Rows of this rank's tokens on their way to their experts, and what their way back needs."""

    rows_RD: Tensor
    """In flight: see :meth:`AllToAll.send`."""
    weights_TK: Tensor
    order: Order
    """Of this rank's rows, by expert and so by rank."""
    order_there: Order
    """Of the rows received, by this rank's experts."""
    tokens_Q: Tensor
    """Rows of each of this rank's experts, known to the host."""
    there: AllToAll
    back: AllToAll

    def delivery(self) -> Delivery:
        """Returns what delivers it."""
        return _Straight(self)


class _Straight:
    """Delivery of rows that each go straight to their expert's rank."""

    def __init__(self, shipment: Shipment) -> None:
        self.shipment, self.order_there, self.tokens_Q = shipment, shipment.order_there, shipment.tokens_Q
        self.sent_back_ND: Tensor | None = None

    def pass_on(self) -> None:
        """Leaves them on their way."""

    def arrive(self) -> Tensor:
        return self.shipment.there.receive(self.shipment.rows_RD)

    def send_back(self, out_ND: Tensor) -> None:
        self.sent_back_ND = self.shipment.back.send(out_ND)

    def pass_back(self) -> None:
        """Leaves them on their way."""

    def outputs(self) -> Tensor:
        assert self.sent_back_ND is not None
        rows_RD = self.shipment.back.receive(self.sent_back_ND)
        (places_R, experts_R, ends_E), weights_TK = self.shipment.order, self.shipment.weights_TK
        out_TD: Tensor = ops.scatter(
            rows_RD, places_R, experts_R, weights_TK.flatten(), ends_E, weights_TK.shape[1]
        )
        return out_TD


class Deliverable(Protocol):
    """A shipment of any way: a tuple of tensors, in which FSDP2 finds those that want gradients."""

    def delivery(self) -> Delivery:
        """Returns what delivers it."""


class Way(Protocol):
    """A way of rows to their experts that is not straight."""

    def send(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: int, *, packs: bool
    ) -> Deliverable:
        """Starts to send each token's row to the ranks of its experts.

        Args:
            x_TD: the tokens.
            weights_TK: of their experts.
            experts_TK: int64.
            experts: E.
            packs: send rows in fp8.
        """


class ExchangingExperts(ParallelDroplessMLP):
    """A layer's experts, whose tokens may be sent before they are called.

    Called with what :meth:`send` returned, for one or several parts of a microbatch, they return their
    outputs; called as in MegaBlocks, with a whole microbatch, they send and receive by themselves.
    """

    packs = False
    """Send tokens to their experts in fp8: see :mod:`train.model.packed_rows`."""
    way: Way | None = None
    """None: straight."""

    def forward(self, *inputs: Any) -> Any:
        """Returns the output of a microbatch, or a list with the output [T, D] of each shipment."""
        if isinstance(inputs[0], Tensor):
            return super().forward(*inputs)
        return self.receive(*inputs)

    def parallel_forward_once(
        self, x: Tensor, expert_weights: Tensor, top_experts: Tensor
    ) -> tuple[Tensor, None]:
        """Sends a microbatch and receives it at once, in place of MegaBlocks' method of this name."""
        (out_TD,) = self.receive(self.send(x.view(-1, x.shape[-1]), expert_weights, top_experts))
        return out_TD, None

    def send(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Deliverable:
        """Sends each token's row to the ranks of its experts."""
        if self.way is not None:
            return self.way.send(x_TD, weights_TK, experts_TK, self.num_experts, packs=self.packs)
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
            order_there = order_by_expert(counts.received_PQ, sum(received))
            tokens_Q = on_host_2PQ[1].sum(dim=0, dtype=torch.int)
        return Shipment(in_flight_RD, weights_TK, order, order_there, tokens_Q, there, back)

    def receive(self, *shipments: Deliverable) -> list[Tensor]:
        """Runs this rank's experts on the rows of each shipment, and returns its tokens' outputs, [T, D].

        One comes back while the next is computed.
        """
        deliveries = [shipment.delivery() for shipment in shipments]
        for each in deliveries:
            each.pass_on()
        for each in deliveries:
            arrived_ND = each.arrive()
            out_ND = self.permute_and_compute(
                arrived_ND,
                each.tokens_Q,
                each.order_there.places_R,
                each.order_there.experts_R,
                None,  # weights: those whose tokens they are apply them
                each.order_there.ends_E,
                -1,  # capacity: none is dropped
                top_k=1,
            )
            each.send_back(out_ND)
        for each in deliveries:
            each.pass_back()
        return [each.outputs() for each in deliveries]


def order_by_expert(received_PQ: Tensor, rows: int, ranks_P: Tensor | None = None) -> Order:
    """Returns the order by expert of rows that are sorted by the rank that sent them, then by expert.

    Args:
        received_PQ: int32: the numbers of rows, known to the device.
        rows: their sum.
        ranks_P: int32: those by which an expert's rows are sorted in turn; None: as they came.
    """
    ranks, experts = received_PQ.shape
    experts_E = torch.arange(experts, dtype=torch.int32, device=received_PQ.device).repeat(ranks)
    keys_E = experts_E if ranks_P is None else experts_E * ranks + ranks_P.repeat_interleave(experts)
    keys_N = keys_E.repeat_interleave(received_PQ.flatten(), output_size=rows)
    sorted_N, places_N = ops.sort(keys_N, max(1, (ranks * experts - 1).bit_length()))
    if ranks_P is not None:
        sorted_N = sorted_N // ranks
    ends_Q = ops.inclusive_cumsum(received_PQ.sum(dim=0, dtype=torch.int), 0)
    return Order(places_N, sorted_N, ends_Q.view(-1))
