"""Tensor parallelism: ranks that share dense weights compute the losses and gradients of one that has all."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.verify.forked_ranks import run_ranks
from tests.train.model.test_context import EXPERTS, MOE, S, batch_of
from train.layout.mesh import build_mesh, build_sharded
from train.layout.optim import average_replicated_gradients
from train.model.attention import DocumentKernel
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.tensor_parallel import TensorGroup, _routes
from train.recipe.schema import Norm, Parallelism, Precision, QkNormOver, Recipe, Recompute, Training
from train.recipe.topology import Topology
from train.step.microbatch import MicrobatchModel

# A dense layer, then one of experts with a shared one; the weights of norms are of either kind.
MIXED = replace(
    MOE,
    n_kv_heads=4,
    n_heads=8,
    clip_qkv=0.5,
    qk_norm=True,
    qk_norm_over=QkNormOver.each_head,
    moe=replace(EXPERTS, dense_layers=1, shared_hidden_size=24, shared_gate=True),
)
PLAIN = replace(MIXED, moe=None, norm=Norm.layernorm, qk_norm=False, clip_qkv=None)
CASES = {
    "documents, a bias": (MIXED, DocumentKernel.bias, True, Recompute.nothing),
    "documents, variable length": (MIXED, DocumentKernel.varlen, True, Recompute.elementwise),
    "whole, recomputed": (MIXED, DocumentKernel.bias, False, Recompute.layer),
    "dense": (PLAIN, DocumentKernel.bias, True, Recompute.gates),
}


def train(case: str, layout: Parallelism | None, rank: Topology) -> dict[str, Tensor]:
    """Losses and gradients, averaged over ranks, and the logits of sequences of the rank's own."""
    cfg, kernel, masked, how = CASES[case]
    if layout is None:
        decoder = Decoder(cfg, device="cpu", recompute=how)
        initialize(decoder, cfg, seed=1)
    else:
        decoder = Decoder(cfg, device="meta", recompute=how)
        mesh = build_mesh(layout, rank.world_size, "cpu")
        build_sharded(decoder, mesh, Precision.fp32, seed=1)
        assert isinstance(decoder.context, TensorGroup)
    decoder.transformer.document_kernel = kernel
    model = MicrobatchModel(
        decoder, Recipe(model=cfg, training=Training(document_masking=masked)), Precision.fp32
    )
    batch = batch_of(cfg)
    outputs = model(batch)
    losses = model.loss(outputs, batch)
    losses["total"].backward()
    average_replicated_gradients(decoder.parameters())
    found = {name: loss.detach().clone() for name, loss in losses.items()}
    for value in found.values():
        dist.all_reduce(value.div_(rank.world_size))
    for name, parameter in decoder.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    decoder.eval()
    with torch.no_grad():
        own_BS = batch["input_ids"][rank.rank :, : S - rank.rank]
        found["logits"] = decoder(own_BS, None).logits_BSV
    return found


@pytest.mark.slow
def test_parts_train_what_whole_layers_do() -> None:
    """Dense layers, shared experts, norms of heads, the balance of each sequence, router noise; evaluation,
    in which ranks have sequences of their own, of other numbers and lengths.
    """

    def work(rank: Topology) -> None:
        for name, (cfg, *_) in CASES.items():
            layout = Parallelism(tensor=2, expert=2 if cfg.moe else 1)
            expected, found = train(name, None, rank), train(name, layout, rank)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                scale = max(value.abs().max().item(), 1e-3)
                torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5 * scale, msg=f"{name}: {key}")

    run_ranks(2, work)


@pytest.mark.parametrize(("kinds", "ranks"), [((8, 4, 4), 4), ((4, 2, 2), 2), ((6, 3, 3), 3), ((2, 2, 2), 2)])
def test_each_rank_gets_its_heads_of_each_kind_in_order(kinds: tuple[int, ...], ranks: int) -> None:
    """Of queries, keys and values each rank has one run, the same share of each, wherever it was computed."""
    routes = [_routes(kinds, ranks, rank) for rank in range(ranks)]
    each, starts = sum(kinds) // ranks, [sum(kinds[:number]) for number in range(len(kinds))]
    for rank in range(ranks):
        arrived = []
        for source, (order, sent, _) in enumerate(routes):
            first = sum(sent[:rank])
            arrived += [source * each + place for place in order[first : first + sent[rank]]]
            assert routes[rank][2][source] == sent[rank]
        shares = [
            (start + rank * count // ranks, count // ranks)
            for start, count in zip(starts, kinds, strict=True)
        ]
        assert arrived == [head for start, count in shares for head in range(start, start + count)]
