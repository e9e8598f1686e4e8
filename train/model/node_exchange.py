"""The exchange of tokens once per node: `parallelism.exchange_node_ranks`.

A token whose experts are on several ranks of another node would cross the network once for each. Here it
crosses once: its row is sent to the rank of that node with this rank's own place in its node, which passes
copies on inside the node; on the way back that rank sums the experts' outputs by the token's weights, and one
sum crosses. Gradients take the same ways in the other direction. So do DeepSeek-V3's tokens travel (arXiv
2412.19437, section 3.2.2).

An expert's rows are the same and in the same order as if they had come straight, so its outputs, and its
gradients from equal gradients, are equal bit for bit. Sums over a token's experts are sums of nodes' sums:
with one expert per token equal bit for bit in fp32, else but for rounding, in bf16 once more for each sum
that crosses.

The numbers of rows are exchanged in both steps before the host waits, once. With each row its experts and
weights cross, as numbers in fp32.

Shapes: T tokens, K experts per token, M nodes of the group, L ranks of each, P = M x L, E experts, Q = E / P
experts of a rank, D model; X rows that this rank sends across, Y that arrive, R copies of these, N rows of
this rank's experts; W rows and S places of their copies.
"""

# ruff: noqa: N815  (shape suffixes)

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from train.model import megablocks_ops
from train.model.exchange import AllToAll, Delivery, Order, order_by_expert
from train.model.recompute import kept


class OncePerNode:
    """The ranks over which rows go to their experts.

    Args:
        across: those of all nodes with this rank's place in its node.
        within: those of this rank's node.
    """

    def __init__(self, across: dist.ProcessGroup, within: dist.ProcessGroup) -> None:
        self.across, self.within = across, within

    def send(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: int, *, packs: bool
    ) -> "NodeShipment":
        """Starts to send each token's row across, once to each node of its experts."""
        nodes, of_node = self.across.size(), experts // self.across.size()
        with torch.no_grad():
            nodes_TK = experts_TK // of_node
            is_there_TM = torch.zeros(len(x_TD), nodes, dtype=torch.bool, device=x_TD.device)
            is_there_TM.scatter_(1, nodes_TK, True)
            counts = kept(lambda: NodeCounts(is_there_TM, experts_TK, experts, self))
            on_host = counts.on_host()
            keys_TM = torch.where(is_there_TM, torch.arange(nodes, device=x_TD.device), nodes)
            crossing = Copies.sorted_by(keys_TM, nodes, sum(on_host.sent_M))
            tokens_X, nodes_X = crossing.rows_R, crossing.slots_R % nodes
            is_there_XK = nodes_TK[tokens_X] == nodes_X[:, None]
            # Its place on its node; that of another node's is none.
            experts_XK = torch.where(is_there_XK, experts_TK[tokens_X] % of_node, of_node)
        there = AllToAll(self.across, on_host.sent_M, on_host.received_M, packs=packs)
        labels = AllToAll(self.across, on_host.sent_M, on_host.received_M)
        weights_XK = copied(weights_TK, crossing) * is_there_XK
        labels_XK = torch.cat([experts_XK.to(weights_XK.dtype), weights_XK], dim=1)
        return NodeShipment(
            there.send(copied(x_TD, crossing)), labels.send(labels_XK), crossing, there, labels, counts, self
        )


class OnHost(NamedTuple):
    """Numbers of rows in both steps, known to the host."""

    sent_M: list[int]
    received_M: list[int]
    passed_on_L: list[int]
    arriving_L: list[int]
    tokens_Q: Tensor
    """int32: rows of each of this rank's experts."""


class NodeCounts:
    """Numbers of rows that ranks send each other, across and within nodes.

    Args:
        is_there_TM: which nodes have experts of each token's.
        experts_TK: int64.
        experts: E.
        ranks: the groups.
    """

    def __init__(self, is_there_TM: Tensor, experts_TK: Tensor, experts: int, ranks: OncePerNode) -> None:
        nodes, local = ranks.across.size(), ranks.within.size()
        rows_M = is_there_TM.sum(dim=0, dtype=torch.int32)
        tokens_E = megablocks_ops.histogram(experts_TK.flatten(), experts)
        sent = torch.cat([rows_M[:, None], tokens_E.view(nodes, -1)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=ranks.across)
        self.crossed_M = received[:, 0]
        """int32: rows that arrive from each node."""
        passed_LMQ = received[:, 1:].reshape(nodes, local, -1).transpose(0, 1).contiguous()
        self.arriving_LMQ = torch.empty_like(passed_LMQ)
        """int32: rows of each of this rank's experts, by the rank that passes them on and by node."""
        self._in_flight = dist.all_to_all_single(
            self.arriving_LMQ, passed_LMQ, group=ranks.within, async_op=True
        )
        self._of_rows = (rows_M, self.crossed_M, passed_LMQ)
        self._on_host: OnHost | None = None

    def on_host(self) -> OnHost:
        """Returns what the host needs; it waits the first time."""
        if self._on_host is None:
            assert self._in_flight is not None
            self._in_flight.wait()
            self._in_flight = None
            rows_M, crossed_M, passed_LMQ = self._of_rows
            sums = (rows_M, crossed_M, passed_LMQ.sum((1, 2)), self.arriving_LMQ.sum((1, 2)))
            tokens_Q = self.arriving_LMQ.sum((0, 1), dtype=torch.int32)
            parts = [each.to(torch.int32) for each in (*sums, tokens_Q)]
            found = torch.cat(parts).cpu().split([len(part) for part in parts])
            sent, received, passed_on, arriving = (part.tolist() for part in found[:4])
            self._on_host = OnHost(sent, received, passed_on, arriving, found[4])
        return self._on_host


class NodeShipment(NamedTuple):
    """Rows of this rank's tokens on their way across, and what their way back needs."""

    rows_XD: Tensor
    """In flight: see :meth:`AllToAll.send`."""
    labels_XK: Tensor
    """In flight: K places of experts on the node, and their weights."""
    crossing: "Copies"
    """Of tokens, by node."""
    there: AllToAll
    labels: AllToAll
    counts: NodeCounts
    ranks: OncePerNode

    def delivery(self) -> Delivery:
        """Returns what delivers it."""
        return OverNode(self)


class OverNode:
    """Delivery of rows that have crossed to their experts' node."""

    def __init__(self, shipment: NodeShipment) -> None:
        self.shipment, counts = shipment, shipment.counts
        self.on_host = counts.on_host()
        local, nodes, _ = counts.arriving_LMQ.shape
        self.tokens_Q = self.on_host.tokens_Q
        with torch.no_grad():
            # As if each had come straight from its token's rank.
            ranks_P = torch.arange(local * nodes, dtype=torch.int32, device=counts.crossed_M.device)
            ranks_P = ranks_P.view(nodes, local).t().flatten()
            received_PQ = counts.arriving_LMQ.flatten(0, 1)
            self.order_there: Order = order_by_expert(received_PQ, sum(self.on_host.arriving_L), ranks_P)
        self.in_flight: Tensor | None = None

    def pass_on(self) -> None:
        """Spreads the rows that have crossed, once they are there."""
        shipment, on_host, within = self.shipment, self.on_host, self.shipment.ranks.within
        labels_YK = shipment.labels.receive(shipment.labels_XK)
        places_YK, self.weights_YK = labels_YK.chunk(2, dim=1)
        with torch.no_grad():
            self.copies = self._copies(places_YK)
        packs = shipment.there.packs  # What was rounded to fp8 is the same when it is rounded again.
        self.onward = AllToAll(within, on_host.passed_on_L, on_host.arriving_L, packs=packs)
        rows_YD = shipment.there.receive(shipment.rows_XD)
        self.in_flight = self.onward.send(copied(rows_YD, self.copies))

    def arrive(self) -> Tensor:
        """Returns the rows of this rank's experts."""
        assert self.in_flight is not None
        return self.onward.receive(self.in_flight)

    def send_back(self, out_ND: Tensor) -> None:
        """Sends outputs to the rank that passed their rows on."""
        self.back = AllToAll(self.shipment.ranks.within, self.on_host.arriving_L, self.on_host.passed_on_L)
        self.in_flight = self.back.send(out_ND)

    def pass_back(self) -> None:
        """Sums outputs of each row, and sends the sums across."""
        assert self.in_flight is not None
        out_YD = summed(self.back.receive(self.in_flight), self.copies, self.weights_YK)
        on_host = self.on_host
        self.back = AllToAll(self.shipment.ranks.across, on_host.received_M, on_host.sent_M)
        self.in_flight = self.back.send(out_YD)

    def outputs(self) -> Tensor:
        """Sums what comes from all nodes."""
        assert self.in_flight is not None
        return summed(self.back.receive(self.in_flight), self.shipment.crossing)

    def _copies(self, places_YK: Tensor) -> "Copies":
        """Returns the order of copies by rank, then by their tokens' node, then by expert."""
        counts = self.shipment.counts
        local, nodes, of_rank = counts.arriving_LMQ.shape
        node_Y = torch.arange(nodes, device=places_YK.device)
        node_Y = node_Y.repeat_interleave(counts.crossed_M, output_size=sum(self.on_host.received_M))
        places_YK = places_YK.long()
        rank_YK, expert_YK = places_YK // of_rank, places_YK % of_rank
        none = local * nodes * of_rank
        keys_YK = (rank_YK * nodes + node_Y[:, None]) * of_rank + expert_YK
        keys_YK = torch.where(rank_YK < local, keys_YK, none)
        return Copies.sorted_by(keys_YK, none, sum(self.on_host.passed_on_L))


class Copies(NamedTuple):
    """Copies of rows: for each row some of S, in an order of their own."""

    slots_R: Tensor
    """int64: the place of each copy among W x S."""
    rows_R: Tensor
    """int64: the row that it is a copy of."""
    copies_WS: Tensor
    """int64: the copy in each place; where there is none, another one of the row's."""
    is_copy_WS: Tensor

    @classmethod
    def sorted_by(cls, keys_WS: Tensor, none: int, copies: int) -> "Copies":
        """Orders copies by their keys, those with one key by row.

        Args:
            keys_WS: int64, up to ``none``, which means that there is no copy.
            none: above all keys.
            copies: R, the number of keys below ``none``.
        """
        slots_R = torch.sort(keys_WS.flatten(), stable=True).indices[:copies]
        numbers_R = torch.arange(copies, device=keys_WS.device)
        copies_WS = torch.full_like(keys_WS, -1).flatten().index_copy(0, slots_R, numbers_R)
        copies_WS = copies_WS.view_as(keys_WS)
        is_copy_WS = copies_WS >= 0
        others_W1 = copies_WS.amax(dim=1, keepdim=True).clamp(min=0)
        places = keys_WS.shape[1]
        return cls(slots_R, slots_R // places, torch.where(is_copy_WS, copies_WS, others_W1), is_copy_WS)


def copied(x_WD: Tensor, copies: Copies) -> Tensor:
    """Returns the copies of rows, [R, D]."""
    result: Tensor = _Copied.apply(x_WD, copies)
    return result


def summed(x_RD: Tensor, copies: Copies, weights_WS: Tensor | None = None) -> Tensor:
    """Returns for each row the sum of its copies, multiplied by their weights if given, [W, D]."""
    result: Tensor = _Summed.apply(x_RD, weights_WS, copies)
    return result


class _Copied(torch.autograd.Function):
    """Copies of rows; in the backward pass, sums of their gradients."""

    @staticmethod
    def forward(ctx: Any, x_WD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x_WD.index_select(0, copies.rows_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sums(grads[0], ctx.copies), None


class _Summed(torch.autograd.Function):
    """Weighted sums of rows' copies."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weights_WS: Tensor | None, copies: Copies) -> Tensor:
        ctx.copies, ctx.has_weights = copies, weights_WS is not None
        if weights_WS is None:
            # Saved, not noted: a layer that is made again must not end with rows on their way.
            ctx.save_for_backward(copies.rows_R)
            return _sums(x_RD, copies)
        ctx.save_for_backward(*([x_RD] if ctx.needs_input_grad[1] else []), weights_WS)
        return _sums(_scaled(x_RD, weights_WS, copies), copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        copies: Copies = ctx.copies
        *x_RD, weights_WS = ctx.saved_tensors
        grad_RD = grads[0].index_select(0, copies.rows_R)
        if not ctx.has_weights:
            return grad_RD, None, None
        of_weights_WS = None
        if x_RD:
            of_weights_R = (x_RD[0] * grad_RD).sum(dim=1, dtype=weights_WS.dtype)
            of_weights_WS = torch.zeros_like(weights_WS).flatten()
            of_weights_WS = of_weights_WS.index_copy(0, copies.slots_R, of_weights_R).view_as(weights_WS)
        return _scaled(grad_RD, weights_WS, copies), of_weights_WS, None


def _scaled(x_RD: Tensor, weights_WS: Tensor, copies: Copies) -> Tensor:
    weights_R1 = weights_WS.flatten().index_select(0, copies.slots_R)[:, None]
    return (x_RD * weights_R1).to(x_RD.dtype)


def _sums(x_RD: Tensor, copies: Copies) -> Tensor:
    """One pass, which adds up in fp32 in the order of the places."""
    if len(x_RD) == 0 or len(copies.copies_WS) == 0:
        return x_RD.new_zeros(len(copies.copies_WS), x_RD.shape[1])
    is_copy_WS = copies.is_copy_WS.to(x_RD.dtype)
    return functional.embedding_bag(copies.copies_WS, x_RD, mode="sum", per_sample_weights=is_copy_WS)
