"""The exchange of tokens on several ranks: halves equal the whole, and each hides the other's exchange."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.verify.forked_ranks import run_ranks
from tests.fake_world import CFG, local
from train.layout.mesh import build_mesh, build_sharded
from train.layout.optim import average_replicated_gradients
from train.model import experts
from train.model.block_scaling import dequantised, quantised
from train.model.decoder import Decoder
from train.model.exchange import AllToAll
from train.model.moe import MoE
from train.model.router import Jitter, Router
from train.model.router_noise import noise_key
from train.recipe.schema import (
    BalanceScope,
    ExchangePrecision,
    Model,
    Moe,
    Parallelism,
    Precision,
    Recompute,
)
from train.recipe.topology import Topology
from train.step.microbatch import number_sequences

pytestmark = pytest.mark.slow

B, S = 4, 8
FINE = Moe(experts=8, top_k=3, jitter_eps=0.2, shared_hidden_size=16, balance_scope=BalanceScope.sequence)
MODEL = replace(CFG, moe=FINE)
KEPT, AGAIN = Recompute.nothing, Recompute.layer


def make(
    rank: Topology,
    expert: int,
    grade: Recompute,
    *,
    interleave: bool,
    layers: int = 2,
    model: Model = MODEL,
    exchange: ExchangePrecision = ExchangePrecision.same,
    node: int | None = None,
    precision: Precision = Precision.fp32,
) -> Decoder:
    assert model.moe is not None
    moe = replace(model.moe, dense_layers=layers - 1)
    decoder = Decoder(replace(model, n_layers=layers, moe=moe), device="meta", recompute=grade)
    layout = Parallelism(expert=expert, interleave=interleave, exchange_precision=exchange)
    layout = replace(layout, exchange_node_ranks=node)
    build_sharded(decoder, build_mesh(layout, rank.world_size, "cpu"), precision, 17)
    for layer, router in enumerate(module for module in decoder.modules() if isinstance(module, Router)):
        positions_B = torch.arange(B) + B * rank.rank
        router.jitter = Jitter(noise_key(1, layer, torch.device("cpu")), positions_B)
    return decoder


def train(decoder: Decoder, rank: Topology) -> tuple[dict[str, Tensor], Tensor]:
    """One pass in both directions: losses and gradients by name, and tokens per expert."""
    generator = torch.Generator().manual_seed(rank.rank)
    ids_BS = torch.randint(CFG.vocab_size, (B, S), generator=generator)
    documents_BS = (torch.rand((B, S), generator=generator) < 0.2).cumsum(dim=1)
    for mixture in (module for module in decoder.modules() if isinstance(module, MoE)):
        sequence_BS = number_sequences(ids_BS.shape, documents_BS, ids_BS.device)
        mixture.sequence_T, mixture.first_B = sequence_BS.flatten(), sequence_BS[:, 0]
    out = decoder(ids_BS, documents_BS, ids_BS)
    (out.loss_sum + out.balance_loss + out.sequence_balance + 0.1 * out.z_loss).backward()
    average_replicated_gradients(decoder.parameters())
    found = {
        "loss": out.loss_sum,
        "balance": out.balance_loss,
        "z": out.z_loss,
        "sequences": out.sequence_balance,
    }
    gradients = {name: local(p.grad).clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in found.items()} | gradients, out.expert_tokens_LE


@pytest.mark.parametrize(("world", "expert"), [(2, 2), (4, 2), (4, 4)])
def test_halves_train_what_the_whole_microbatch_does(world: int, expert: int) -> None:
    """Kept or recomputed, with documents, a shared expert, a dense layer, the balance of each sequence, and
    noise in the router that depends on a sequence's place.
    """

    def work(rank: Topology) -> None:
        whole, tokens = train(make(rank, expert, KEPT, interleave=False), rank)
        for grade in (KEPT, AGAIN):
            halves, of_halves = train(make(rank, expert, grade, interleave=True), rank)
            assert torch.equal(tokens, of_halves)
            for name, value in whole.items():
                scale = value.abs().max().item()
                torch.testing.assert_close(halves[name], value, rtol=0, atol=2e-6 * scale, msg=name)

    run_ranks(world, work)


GRADES = [(grade, False) for grade in Recompute] + [(KEPT, True), (AGAIN, True)]


def test_a_recomputed_exchange_has_its_counts_and_the_same_gradients() -> None:
    """By grade: the counts are exchanged, and waited for, once for each (half of a) microbatch."""

    def work(rank: Topology) -> list[int]:
        exchange, counts = dist.all_to_all_single, [0]
        kept: dict[bool, dict[str, Tensor]] = {}

        def all_to_all_single(output: Tensor, sent: Tensor, **keywords: Any) -> Any:
            counts[-1] += not sent.is_floating_point()
            return exchange(output, sent, **keywords)

        dist.all_to_all_single = all_to_all_single  # type: ignore[assignment]  # in a test's own process
        for grade, interleave in GRADES:
            found, _ = train(make(rank, 2, grade, interleave=interleave), rank)
            counts.append(0)
            for name, value in kept.setdefault(interleave, found).items():
                assert torch.equal(found[name], value), (grade, interleave, name)
        return counts[:-1]

    expected = [2 if interleave else 1 for _, interleave in GRADES]  # of the two layers one has experts
    assert run_ranks(2, work) == [expected] * 2


class Log:
    """A rank's products and exchanges, in order; halves are numbered."""

    def __init__(self, decoder: Decoder) -> None:
        self.lines: list[str] = []
        self.exchanges: dict[int, AllToAll] = {}
        attention = decoder.transformer.blocks[0].norm_attn_norm
        assert isinstance(attention, torch.nn.Module)
        attention.register_forward_hook(self._attended)
        glu = experts.grouped_glu

        def grouped_glu(*args: Any, **keywords: Any) -> Tensor:
            return self._noted("experts", glu(*args, **keywords))

        experts.grouped_glu = grouped_glu  # this process is a test's own
        AllToAll.start, AllToAll.finish = (  # type: ignore[method-assign]
            self._exchanging(AllToAll.start, "leave"),
            self._exchanging(AllToAll.finish, "arrive"),
        )

    def _attended(self, _module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0], self._noted("attention", output[1])

    def _noted(self, what: str, output: Tensor) -> Tensor:
        self.lines.append(what)
        output.register_hook(lambda _: self.lines.append(f"{what} back"))
        return output

    def _exchanging(self, method: Callable[..., Tensor], what: str) -> Callable[..., Tensor]:
        def wrapper(exchange: AllToAll, *args: Any, **keywords: Any) -> Tensor:
            self.exchanges.setdefault(id(exchange), exchange)
            number = list(self.exchanges).index(id(exchange)) % 4
            self.lines.append(f"{'ABCD'[number]} {what}")
            return method(exchange, *args, **keywords)

        return wrapper


FORWARD = """attention, A leave, attention, B leave, A arrive, experts, C leave,
B arrive, experts, D leave, C arrive, D arrive"""
"""A and B: the halves to their experts; C and D: back."""
BACKWARD = """D leave, C leave, D arrive, experts back, B leave, C arrive, experts back, A leave,
B arrive, attention back, A arrive, attention back"""


@pytest.mark.parametrize("grade", [KEPT, AGAIN])
def test_each_half_computes_while_the_other_is_on_its_way(grade: Recompute) -> None:
    """In both directions, and when a layer is recomputed. No handle of a collective outlives its wait."""

    def work(rank: Topology) -> list[str]:
        decoder = make(rank, 2, grade, interleave=True, layers=1)
        log = Log(decoder)
        train(decoder, rank)
        assert len(log.exchanges) == (8 if grade is AGAIN else 4)
        assert all(exchange._in_flight is None for exchange in log.exchanges.values())
        return log.lines

    expected = [line.strip() for line in f"{FORWARD}, {BACKWARD}".split(",")]
    if grade is AGAIN:
        expected = [line.strip() for line in f"{FORWARD}, {FORWARD}, {BACKWARD}".split(",")]
    assert run_ranks(2, work) == [expected] * 2


def test_microbatches_that_cannot_be_halved_and_evaluation_are_whole() -> None:
    def work(rank: Topology) -> list[int]:
        decoder = make(rank, 2, KEPT, interleave=True)
        sequences: list[int] = []
        for block in decoder.transformer.blocks:
            attention = block.norm_attn_norm
            assert isinstance(attention, torch.nn.Module)
            attention.register_forward_pre_hook(lambda _, inputs: sequences.append(len(inputs[0])))
        for router in (module for module in decoder.modules() if isinstance(module, Router)):
            router.jitter = None
        decoder(torch.zeros(3, S, dtype=torch.int64))
        decoder.eval()
        decoder(torch.zeros(4, S, dtype=torch.int64))
        return sequences

    assert run_ranks(2, work) == [[3, 3, 4, 4]] * 2


WIDE = replace(MODEL, d_model=256, head_width=16)
"""Of two tiles of fp8 a token."""


class _Rounded(torch.autograd.Function):
    """Rows through fp8, and their gradients as they are."""

    @staticmethod
    def forward(_ctx: Any, rows: Tensor) -> Tensor:
        return dequantised(quantised(rows, 1, 128, has_powers=True)).to(rows.dtype)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize("interleave", [False, True])
def test_tokens_sent_in_fp8_are_those_rounded_before(interleave: bool) -> None:
    """Losses and gradients are equal bit for bit; half of the bytes are sent to experts, all of the rest."""

    def work(rank: Topology) -> tuple[float, float]:
        exchange, send, sent_bytes = dist.all_to_all_single, AllToAll.send, [0]

        def all_to_all_single(output: Tensor, rows: Tensor, **keywords: Any) -> Any:
            sent_bytes[-1] += rows.numel() * rows.element_size() if rows.dtype is not torch.int32 else 0
            return exchange(output, rows, **keywords)

        def sent_in(precision: ExchangePrecision) -> dict[str, Tensor]:
            sent_bytes.append(0)
            decoder = make(rank, 2, KEPT, interleave=interleave, model=WIDE, exchange=precision)
            return train(decoder, rank)[0]

        dist.all_to_all_single = all_to_all_single  # type: ignore[assignment]  # in a test's own process
        found, plain = sent_in(ExchangePrecision.fp8), sent_in(ExchangePrecision.same)
        sends = iter([True, True, False, False] if interleave else [True, False])
        AllToAll.send = lambda self, rows: send(self, _Rounded.apply(rows) if next(sends) else rows)  # type: ignore[method-assign,assignment]
        rounded = sent_in(ExchangePrecision.same)
        for name, value in rounded.items():
            assert torch.equal(found[name], value), name
        rows, (of_fp8, of_plain) = B * S * FINE.top_k, sent_bytes[1:3]
        assert of_plain - of_fp8 == rows * (4 * WIDE.d_model - WIDE.d_model - 2)
        names = [name for name in plain if ".experts." in name]
        errors = [float((found[name] - plain[name]).norm() / plain[name].norm()) for name in names]
        return float(abs(found["loss"] / plain["loss"] - 1)), max(errors)

    for loss, gradients in run_ranks(2, work):
        assert 0 < loss < 1e-3
        assert (
            0.01 < gradients < 0.06
        )  # A number's rounding, evenly spread over 2**-4 of it at most: 2 to 3%.
