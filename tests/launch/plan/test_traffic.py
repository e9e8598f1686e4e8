"""The planner's traffic against collectives counted on real gloo ranks."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.plan.hardware import GPUS
from launch.plan.muon import orthogonalising
from launch.plan.stages import of_shared_embedding, sends
from launch.plan.traffic import Collective, CollectiveKind, collectives
from launch.verify.forked_ranks import run_ranks
from train.health.collectives import CollectiveRecorder, recorded_collectives
from train.layout.mesh import build_mesh, build_sharded, reduce_gradients
from train.layout.optim import average_replicated_gradients, build_optimizer, sum_over_ends
from train.model.decoder import Decoder
from train.model.moe import MoE
from train.model.node_exchange import NodeCounts, OnHost
from train.recipe import sizes
from train.recipe.schema import (
    BalanceScope,
    Data,
    ExchangePrecision,
    Latent,
    Model,
    Moe,
    Optimizer,
    OptimizerKind,
    Parallelism,
    Precision,
    QkNormOver,
    Recipe,
    Recompute,
    ReducePrecision,
    Reduction,
    Training,
)
from train.recipe.topology import Topology
from train.step.microbatch import MicrobatchModel
from train.step.pipelined import PipelinedBatch

pytestmark = pytest.mark.slow

SEQUENCES, SEQUENCE_TOKENS, MICROBATCHES = 2, 32, 2
MOE = Model(
    d_model=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=36,
    vocab_size=101,
    max_sequence_tokens=64,
    moe=Moe(experts=8, top_k=2),
)
MIXED = replace(MOE, n_layers=5, moe=Moe(experts=8, top_k=2, dense_layers=1, every_n_layers=2))
BY_SEQUENCE = replace(MOE, moe=Moe(experts=8, top_k=2, balance_scope=BalanceScope.sequence))
SPLIT = replace(
    MIXED,
    qk_norm=True,
    qk_norm_over=QkNormOver.each_head,
    moe=Moe(experts=8, top_k=2, dense_layers=1, every_n_layers=2, shared_hidden_size=24),
)
DENSE = Model(
    d_model=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    ffn_hidden_size=37,
    vocab_size=101,
    max_sequence_tokens=64,
    tie_embeddings=True,
)
KEPT = Recompute.nothing
COPIES = Parallelism(replicate=2, expert=2)
ONCE, IN_BF16 = Reduction.once_a_batch, replace(COPIES, reduce_precision=ReducePrecision.bf16)
KINDS = {
    "allgather_base": CollectiveKind.all_gather,
    "all_gather_single": CollectiveKind.all_gather,
    "reduce_scatter_base": CollectiveKind.reduce_scatter,
    "reduce_scatter_single": CollectiveKind.reduce_scatter,
    "allreduce": CollectiveKind.all_reduce,
    "alltoall_base": CollectiveKind.all_to_all,
    "all_to_all_single": CollectiveKind.all_to_all,
}
"""Kinds by the method of a process group; those ending in `single` are newer than torch 2.7."""


class Counting(CollectiveRecorder):
    """Adds up the payload of every collective, in bytes, and the calls.

    Groups of one rank send nothing, and FSDP2 of torch 2.15 has no collectives in them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payloads: Counter[CollectiveKind] = Counter()
        self.calls: Counter[CollectiveKind] = Counter()

    def note(self, group: Any, operation: str, arguments: tuple[Any, ...]) -> Any:
        if group.size() > 1:
            self.count(KINDS[operation], arguments)
        return super().note(group, operation, arguments)

    def count(self, kind: CollectiveKind, arguments: tuple[Any, ...]) -> None:
        # Arguments are (output, input, ...); an all-reduce has its tensors in a list.
        tensor = (
            arguments[0][0]
            if kind is CollectiveKind.all_reduce
            else arguments[0 if kind is CollectiveKind.all_gather else 1]
        )
        assert isinstance(tensor, Tensor)
        self.payloads[kind] += tensor.numel() * tensor.element_size()
        self.calls[kind] += 1


def count(
    cfg: Model, layout: Parallelism, precision: Precision, grades: list[Recompute], rank: Topology
) -> tuple[Counter[CollectiveKind], Counter[CollectiveKind]]:
    """Counts a second step of two microbatches, since the first one initialises state.

    Returns:
        Bytes and calls of the collectives.
    """
    decoder = Decoder(cfg, device="meta", recompute=grades, loss_chunk_tokens=64)
    ranks = build_mesh(layout, rank.world_size, "cpu")
    build_sharded(decoder, ranks, precision, seed=0)
    for mixture in (module for module in decoder.modules() if isinstance(module, MoE)):
        mixture.context = ranks.context
        mixture.sequence_T = torch.zeros(SEQUENCES * SEQUENCE_TOKENS, dtype=torch.int64)
        mixture.first_B = mixture.sequence_T[:SEQUENCES]
    generator = torch.Generator().manual_seed(rank.rank)
    ids = torch.randint(cfg.vocab_size, (SEQUENCES, SEQUENCE_TOKENS), generator=generator)

    def step() -> None:
        for left in reversed(range(MICROBATCHES)):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                output = decoder(ids, None, ids, context=ranks.context)
            reduce_gradients(decoder, layout, after_this_pass=left == 0)
            ((output.loss_sum + output.mtp_loss_sum) / ids.numel() + output.balance_loss).backward()
        average_replicated_gradients(decoder.parameters())

    step()
    counting = Counting()
    with recorded_collectives(counting):
        step()
    return counting.payloads, counting.calls


@pytest.mark.parametrize(
    ("cfg", "layout", "world", "precision", "recomputed"),
    [
        pytest.param(MOE, Parallelism(), 2, Precision.bf16, KEPT, id="sharded"),
        pytest.param(MOE, Parallelism(expert=4), 4, Precision.fp32, Recompute.layer, id="experts-recomputed"),
        pytest.param(
            MOE,
            Parallelism(expert=2, interleave=True),
            4,
            Precision.bf16,
            Recompute.layer,
            id="interleaved",
        ),
        pytest.param(MOE, COPIES, 4, Precision.fp32, Recompute.ffn, id="copies"),
        pytest.param(
            MOE, replace(COPIES, reduce=ONCE), 4, Precision.bf16, Recompute.gates, id="reduced-once"
        ),
        pytest.param(MOE, replace(COPIES, gathered_layers=2), 4, Precision.bf16, KEPT, id="gathered"),
        pytest.param(MOE, IN_BF16, 4, Precision.bf16, Recompute.layer, id="reduced-in-bf16"),
        pytest.param(
            MIXED, replace(COPIES, gathered_layers=2), 4, Precision.bf16, Recompute.layer, id="dense-layers"
        ),
        pytest.param(
            replace(MOE, mtp=True),
            replace(COPIES, gathered_layers=2),
            4,
            Precision.bf16,
            Recompute.layer,
            id="multi-token-prediction",
        ),
        pytest.param(
            replace(MOE, d_model=128),
            Parallelism(expert=2, exchange_precision=ExchangePrecision.fp8),
            2,
            Precision.bf16,
            Recompute.layer,
            id="tokens-in-fp8",
        ),
        pytest.param(MOE, Parallelism(expert=2, context=4), 4, Precision.bf16, Recompute.layer, id="shared"),
        pytest.param(
            replace(
                BY_SEQUENCE,
                mtp=True,
                n_kv_heads=4,
                latent=Latent(kv_rank=16, nope_width=8, rope_width=4, v_width=8),
            ),
            Parallelism(context=2),
            4,
            Precision.fp32,
            Recompute.ffn,
            id="by-sequence",
        ),
        pytest.param(
            replace(SPLIT, mtp=True),
            Parallelism(expert=2, tensor=2),
            4,
            Precision.bf16,
            Recompute.ffn,
            id="shared-weights",
        ),
        pytest.param(
            replace(SPLIT, moe=None),
            Parallelism(replicate=2, tensor=2),
            4,
            Precision.fp32,
            Recompute.gates,
            id="shared-dense-weights",
        ),
        pytest.param(DENSE, Parallelism(replicate=2), 4, Precision.bf16, KEPT, id="dense"),
        pytest.param(DENSE, Parallelism(), 3, Precision.fp32, Recompute.layer, id="dense-recomputed"),
    ],
)
def test_bytes_are_those_counted_on_gloo(
    cfg: Model, layout: Parallelism, world: int, precision: Precision, recomputed: Recompute
) -> None:
    grades = [recomputed] * (sizes.layers(cfg) - 1) + [Recompute.nothing]
    ranks = run_ranks(world, lambda rank: count(cfg, layout, precision, grades, rank))
    predicted_bytes: Counter[CollectiveKind] = Counter()
    predicted_calls: Counter[CollectiveKind] = Counter()
    for collective in collectives(
        cfg,
        layout,
        world,
        tokens=SEQUENCES * SEQUENCE_TOKENS,
        compute_bytes=2 if precision is Precision.bf16 else 4,
        grades=grades,
    ):
        if collective.ranks == 1:
            continue
        calls = collective.calls_in_step(MICROBATCHES)
        predicted_bytes[collective.kind] += round(collective.payload_bytes) * calls
        predicted_calls[collective.kind] += calls
    # Tokens return from experts in unequal shares, so only the sum over ranks is fixed.
    counted_bytes = sum((payloads for payloads, _ in ranks), Counter())
    assert counted_bytes == Counter({kind: world * n for kind, n in predicted_bytes.items()})
    assert ranks[0][1] == predicted_calls


@pytest.mark.parametrize(
    ("exchange", "grade"), [(ExchangePrecision.same, KEPT), (ExchangePrecision.fp8, Recompute.layer)]
)
def test_bytes_over_nodes_are_those_counted_on_gloo(exchange: ExchangePrecision, grade: Recompute) -> None:
    """In two halves, for the number of nodes that tokens crossed to, counted where they are sent."""
    layout = Parallelism(expert=4, interleave=True, exchange_precision=exchange, exchange_node_ranks=2)
    cfg = replace(MOE, d_model=128)
    grades = [grade] * cfg.n_layers

    def work(rank: Topology) -> tuple[tuple[Counter[CollectiveKind], Counter[CollectiveKind]], list[float]]:
        crossed, wait = [], NodeCounts.on_host

        def on_host(counts: NodeCounts) -> OnHost:
            crossed.append(sum(wait(counts).sent_M) / (SEQUENCES * SEQUENCE_TOKENS / 2))
            return wait(counts)

        NodeCounts.on_host = on_host  # type: ignore[method-assign]  # in a test's own process
        return count(cfg, layout, Precision.bf16, grades, rank), crossed

    ranks = run_ranks(4, work)
    crossings = [each for _, of_rank in ranks for each in of_rank]
    mean = sum(crossings) / len(crossings)
    assert 1 < mean < 2
    planned = collectives(
        cfg, layout, 4, tokens=SEQUENCES * SEQUENCE_TOKENS, compute_bytes=2, grades=grades, crossings=mean
    )
    sent = [each for each in planned if each.kind is CollectiveKind.all_to_all]
    counted = sum(payloads[CollectiveKind.all_to_all] for (payloads, _), _ in ranks)
    assert counted == pytest.approx(
        4 * sum(each.payload_bytes * each.calls_in_step(MICROBATCHES) for each in sent), rel=1e-12
    )
    (_, calls), _ = ranks[0]
    assert calls[CollectiveKind.all_to_all] == sum(each.calls_in_step(MICROBATCHES) for each in sent)


@pytest.mark.parametrize("layout", [Parallelism(), Parallelism(expert=2), COPIES], ids=str)
def test_muons_bytes_are_those_counted_on_gloo(layout: Parallelism) -> None:
    """On a CPU it sends fp32. Six experts, which four ranks cut through, and two."""
    cfg = replace(MOE, ffn_hidden_size=40, moe=Moe(experts=6, top_k=2))
    own = Optimizer(kind=OptimizerKind.muon, learning_rate=0.01)
    recipe = Recipe(model=cfg, parallelism=layout, optimizer=own)

    def work(rank: Topology) -> tuple[Counter[CollectiveKind], Counter[CollectiveKind]]:
        decoder = Decoder(cfg, device="meta")
        build_sharded(decoder, build_mesh(layout, rank.world_size, "cpu"), Precision.fp32, seed=0)
        optimizer = build_optimizer(decoder, own)
        for parameter in decoder.parameters():
            parameter.grad = torch.ones_like(parameter)
        counting = Counting()
        with recorded_collectives(counting):
            optimizer.step()
        return counting.payloads, counting.calls

    ranks = run_ranks(4, work)
    planned = orthogonalising(recipe, 4, element_bytes=4).collectives
    assert planned and ranks[0][1] == {CollectiveKind.all_to_all: sum(each.calls for each in planned)}
    sent = sum(payloads[CollectiveKind.all_to_all] for payloads, _ in ranks)
    assert sent == pytest.approx(4 * sum(each.calls * each.payload_bytes for each in planned))


def count_sends(
    recipe: Recipe, precision: Precision, rank: Topology
) -> tuple[list[int], Counter[CollectiveKind]]:
    """Counts a batch through the stages of a pipeline: bytes of each send, and of the sum over its ends."""
    layout, model = recipe.parallelism, recipe.model
    _, stage, _ = sizes.place_of(layout, rank.world_size, rank.rank)
    parts = sizes.stage_parts(model, layout, stage)
    decoder = Decoder(model, device="meta", loss_chunk_tokens=64, parts=parts)
    build_sharded(decoder, build_mesh(layout, rank.world_size, "cpu"), precision, seed=0)
    batch = PipelinedBatch(MicrobatchModel(decoder, recipe, precision), layout, lambda *_: None)
    batch.microbatch_sequences = recipe.training.microbatch_sequences
    ids = (
        torch.arange(MICROBATCHES * SEQUENCES * SEQUENCE_TOKENS).view(-1, SEQUENCE_TOKENS) % model.vocab_size
    )
    sent: list[int] = []
    send = dist.ProcessGroup.send

    def noted(group: Any, tensors: list[Tensor], *given: Any) -> Any:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        return send(group, tensors, *given)

    dist.ProcessGroup.send = noted  # type: ignore[method-assign, assignment]
    batch.run({"input_ids": ids, "targets": ids.roll(-1, dims=1), "document_ids": torch.zeros_like(ids)})
    counting = Counting()
    with recorded_collectives(counting):
        if decoder.shared_embedding is not None:
            assert decoder.pipeline is not None and decoder.pipeline.ends is not None
            sum_over_ends(decoder.shared_embedding, decoder.pipeline.ends)
    return sent, counting.payloads


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (Parallelism(pipeline=3, pipeline_layers=[1, 1, 2]), Precision.bf16),
        (Parallelism(pipeline=2, pipeline_chunks=2, expert=2), Precision.fp32),
        (Parallelism(pipeline=2, tensor=2, expert=2), Precision.bf16),
    ],
    ids=["stages", "chunks", "shared-weights"],
)
def test_sends_of_stages_are_those_counted_on_gloo(layout: Parallelism, precision: Precision) -> None:
    training = Training(microbatch_sequences=SEQUENCES, precision=precision)
    own = replace(MOE, n_layers=4, mtp=True, vocab_size=100)
    recipe = Recipe(
        model=own, parallelism=layout, training=training, data=Data(sequence_tokens=SEQUENCE_TOKENS)
    )
    world = layout.pipeline * layout.expert
    ranks = run_ranks(world, lambda rank: count_sends(recipe, precision, rank))
    planned, (summed,) = sends(recipe, world), of_shared_embedding(recipe, world)
    # The ends of the model have one neighbour.
    calls = planned.calls * MICROBATCHES * layout.pipeline - 2 * MICROBATCHES
    assert Counter(size for sent, _ in ranks for size in sent) == {
        planned.payload_bytes: calls * layout.expert
    }
    per_rank = [payloads[CollectiveKind.all_reduce] for _, payloads in ranks]
    stage = world // layout.pipeline
    between = [0] * (world - 2 * stage)
    assert per_rank == [summed.payload_bytes] * stage + between + [summed.payload_bytes] * stage


def collective(kind: CollectiveKind, ranks: int, stride: int = 1) -> Collective:
    return Collective("test", kind, 800.0, ranks, stride, calls=1)


def test_a_ring_sends_all_but_its_own_share() -> None:
    assert collective(CollectiveKind.all_gather, 8).sent_bytes() == 700
    assert collective(CollectiveKind.all_reduce, 8).sent_bytes() == 1400
    assert collective(CollectiveKind.all_gather, 1).sent_bytes() == 0


@pytest.mark.parametrize("kind", CollectiveKind)
@pytest.mark.parametrize(("ranks", "stride"), [(8, 1), (16, 1), (4, 8), (16, 4), (2, 64)])
def test_links_carry_what_is_sent(kind: CollectiveKind, ranks: int, stride: int) -> None:
    found = collective(kind, ranks, stride)
    links = found.link_bytes(8)
    assert links.nvlink + links.network == pytest.approx(found.sent_bytes())
    assert (links.network == 0) == (ranks * stride <= 8)


def test_neighbours_share_network_cards_and_strangers_do_not() -> None:
    assert collective(CollectiveKind.all_gather, 16).link_bytes(8).network == pytest.approx(750 / 8)
    assert collective(CollectiveKind.all_gather, 16, stride=8).link_bytes(8).network == pytest.approx(750)
    slow, fast = (
        collective(CollectiveKind.all_gather, 16, stride=8),
        collective(CollectiveKind.all_gather, 16),
    )
    assert slow.seconds(GPUS["h100"]) > fast.seconds(GPUS["h100"])
