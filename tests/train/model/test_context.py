"""Context parallelism: ranks that share sequences compute the losses and gradients of one that has all."""

import functools
from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.verify.forked_ranks import run_ranks
from tests.fake_world import CFG
from train.model.attention import DocumentKernel
from train.model.context import Context
from train.model.decoder import Decoder
from train.model.documents import document_reach
from train.model.init import initialize
from train.recipe.schema import (
    BalanceScope,
    Latent,
    Model,
    Moe,
    Norm,
    Position,
    Precision,
    Recipe,
    Recompute,
    Training,
    Yarn,
)
from train.recipe.topology import Topology
from train.step.microbatch import Batch, MicrobatchModel

pytestmark = pytest.mark.slow

# B sequences, S tokens of each; two chunks of each of up to four ranks have two tokens.
B, S = 3, 16
EXPERTS = Moe(
    experts=8,
    top_k=2,
    jitter_eps=0.2,
    z_loss_weight=0.1,
    balance_loss_weight=0.5,
    balance_scope=BalanceScope.sequence,
)
MOE = replace(CFG, n_layers=2, n_heads=4, n_kv_heads=2, max_sequence_tokens=S, init_std=0.3, moe=EXPERTS)
ALIBI = replace(MOE, position=Position.alibi, norm=Norm.layernorm, logit_z_loss_weight=0.1)
DENSE = replace(MOE, moe=None, qk_norm=True, clip_qkv=0.5, qkv_bias=True, rope_share=0.5)

LATENT = replace(
    MOE,
    n_kv_heads=4,
    latent=Latent(kv_rank=12, q_rank=20, nope_width=10, rope_width=6, v_width=8),
    yarn=Yarn(factor=4.0, original_tokens=8),
)
AHEAD = replace(LATENT, mtp=True)


def batch_of(model: Model) -> Batch:
    """Documents of one token to a sequence, whose borders and targets lie anywhere; targets cross them."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(model.vocab_size, (B, S), generator=generator)
    documents_BS = (torch.rand((B, S), generator=generator) < 0.2).cumsum(dim=1)
    documents_BS[0] = 0
    targets_BS = ids_BS.roll(-1, dims=1)
    targets_BS[:, -1] = -100
    return {
        "input_ids": ids_BS,
        "document_ids": documents_BS,
        "targets": targets_BS,
        "sample_positions": torch.arange(B) + 7,
    }


def train(
    cfg: Model, kernel: DocumentKernel, masked: bool, how: Recompute, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Losses and gradients in float64; a group's are averaged over its ranks."""
    decoder = Decoder(cfg, device="cpu", recompute=how)
    initialize(decoder, cfg, seed=1)
    decoder.double().transformer.document_kernel = kernel
    decoder.context = None if group is None else Context(group)
    recipe = Recipe(model=cfg, training=Training(document_masking=masked))
    model = MicrobatchModel(decoder, recipe, Precision.fp32)
    batch = batch_of(cfg)
    outputs = model(batch)
    losses = model.loss(outputs, batch)
    losses["total"].backward()
    found = {name: loss.detach().double() for name, loss in losses.items()}
    found |= {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    if group is not None:
        for value in found.values():
            dist.all_reduce(value.div_(group.size()), group=group)
    return found


CASES = {
    "documents, a bias": (MOE, DocumentKernel.bias, True, Recompute.nothing),
    "documents, blocks": (MOE, DocumentKernel.flex, True, Recompute.layer),
    "documents, variable length": (MOE, DocumentKernel.varlen, True, Recompute.elementwise),
    "whole, a bias": (MOE, DocumentKernel.bias, False, Recompute.layer),
    "whole, variable length": (DENSE, DocumentKernel.varlen, False, Recompute.gates),
    "dense, documents": (DENSE, DocumentKernel.varlen, True, Recompute.ffn),
    "latent, a bias": (LATENT, DocumentKernel.bias, True, Recompute.gates),
    "latent, blocks": (LATENT, DocumentKernel.flex, False, Recompute.elementwise),
    "latent and ahead": (AHEAD, DocumentKernel.varlen, True, Recompute.gates),
    "ahead": (replace(DENSE, mtp=True), DocumentKernel.bias, False, Recompute.layer),
    "alibi": (ALIBI, DocumentKernel.bias, True, Recompute.nothing),
}


@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, CASES), (4, ["documents, a bias", "documents, variable length", "latent and ahead"])],
)
def test_parts_train_what_whole_sequences_do(ranks: int, names: Collection[str]) -> None:
    """With every kernel: router noise, z-losses, the balance of each sequence, targets in another's part."""

    def work(rank: Topology) -> None:
        world = dist.group.WORLD
        assert world is not None
        for name in names:
            expected, found = train(*CASES[name], None), train(*CASES[name], world)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                # The sum of the losses is in fp32.
                is_loss = value.ndim == 0
                scale = value.abs().max().item()
                torch.testing.assert_close(
                    found[key], value, rtol=0, atol=(1e-6 if is_loss else 1e-9) * scale, msg=f"{name}: {key}"
                )

    run_ranks(ranks, work)


def largest_logits(
    cfg: Model, kernel: DocumentKernel, masked: bool, group: dist.ProcessGroup | None
) -> Tensor:
    """Of each layer and head, over a group's ranks."""
    decoder = Decoder(cfg, device="cpu", recompute=Recompute.nothing)
    initialize(decoder, cfg, seed=1)
    decoder.double().train().transformer.document_kernel = kernel
    decoder.context = None if group is None else Context(group)
    watching = decoder.watch_logits()
    recipe = Recipe(model=cfg, training=Training(document_masking=masked))
    MicrobatchModel(decoder, recipe, Precision.fp32)(batch_of(cfg))
    found = [each.logits.of_heads_H for each in watching if each.logits is not None]
    largest_LH = torch.stack([largest_H for largest_H in found if largest_H is not None])
    assert len(largest_LH) == len(watching)
    if group is not None:
        dist.all_reduce(largest_LH, op=dist.ReduceOp.MAX, group=group)
    return largest_LH


def test_the_largest_logits_are_those_of_whole_sequences() -> None:
    """Whichever keys a kernel is given; QK-clip reads them."""

    def work(_: Topology) -> None:
        world = dist.group.WORLD
        for cfg in (replace(MOE, clip_qkv=None), AHEAD):
            for masked in (True, False):
                for kernel in DocumentKernel:
                    expected = largest_logits(cfg, kernel, masked, None)
                    torch.testing.assert_close(largest_logits(cfg, kernel, masked, world), expected)

    run_ranks(2, work)


def test_gathered_keys_are_in_order_and_gradients_are_sums() -> None:
    """Keys and values of different widths; the gradient of every rank differs."""

    def work(rank: Topology) -> None:
        world = dist.group.WORLD
        assert world is not None
        context = Context(world)
        k_BSGR, v_BSGV = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 2)
        dist.broadcast(k_BSGR, 0)
        dist.broadcast(v_BSGV, 0)
        own = [context.part(x).requires_grad_() for x in (k_BSGR, v_BSGV)]
        whole = context.gather(*own)
        assert torch.equal(whole[0], k_BSGR) and torch.equal(whole[1], v_BSGV)
        grads = [torch.randn_like(x) for x in whole]
        torch.autograd.backward(whole, grads)
        for x, grad in zip(own, grads, strict=True):
            torch.testing.assert_close(x.grad, context.part(context.sum(grad)))

    run_ranks(2, work)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_document_s_queries_are_the_last_of_its_keys(ranks: int) -> None:
    """Of all ranks together every token is a query once, and sees what a mask lets it see."""
    length = 4 * ranks
    generator = torch.Generator().manual_seed(3)
    documents_BS = (torch.rand((5, length), generator=generator) < 0.3).cumsum(dim=1)
    seen = torch.zeros(5, length, length, dtype=torch.int64)
    for rank in range(ranks):
        context = object.__new__(Context)
        context.rank, context.ranks = rank, ranks
        places = context.places(length, documents_BS.device)
        reach = document_reach(documents_BS, context)
        query_T = torch.tensor([(b, place) for b in range(5) for place in places.tolist()])
        key_T = torch.tensor([(b, place) for b, begin, end in reach.spans for place in range(begin, end)])
        pairs = zip(
            query_T.split(reach.queries.offsets.diff().tolist()),
            key_T.split(reach.keys.offsets.diff().tolist()),
            strict=True,
        )
        for queries, keys in pairs:
            assert torch.equal(keys[-len(queries) :], queries)
            assert len(queries) <= reach.queries.longest and len(keys) <= reach.keys.longest
            for number, (b, place) in enumerate(queries.tolist()):
                visible = keys[: len(keys) - len(queries) + number + 1]
                seen[b, place, visible[:, 1]] += 1
    allowed = documents_BS[:, :, None] == documents_BS[:, None, :]
    assert torch.equal(seen, (allowed & torch.ones(length, length, dtype=torch.bool).tril()).long())


def test_ranks_have_equally_many_visible_pairs() -> None:
    context = functools.partial(object.__new__, Context)
    pairs = set()
    for rank in range(4):
        one = context()
        one.rank, one.ranks = rank, 4
        pairs.add(int((one.places(32, torch.device("cpu")) + 1).sum()))
    assert len(pairs) == 1
