"""Tokens sent once per node train what tokens sent straight do; ranks of one machine stand for nodes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from launch.verify.forked_ranks import run_ranks
from tests.train.model.test_exchange import KEPT, WIDE, make, train
from train.model import experts
from train.model.node_exchange import Copies, copied, summed
from train.recipe.schema import ExchangePrecision, Model, Precision, Recompute
from train.recipe.topology import Topology

NODE = 2
SAME = ExchangePrecision.same


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all losses and gradients, as a share of each one's largest number."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in wanted.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("interleave", [False, True])
def test_once_per_node_trains_what_straight_does(interleave: bool) -> None:
    """Kept or recomputed, with documents, a shared expert, a dense layer and noise in the router."""

    def work(rank: Topology) -> None:
        straight, tokens = train(make(rank, 4, KEPT, interleave=interleave), rank)
        kept, of_kept = train(make(rank, 4, KEPT, interleave=interleave, node=NODE), rank)
        assert torch.equal(tokens, of_kept)
        assert 0 < largest_error(kept, straight) < 2e-6
        for grade in (Recompute.gates, Recompute.layer):
            again, _ = train(make(rank, 4, grade, interleave=interleave, node=NODE), rank)
            for name, value in kept.items():
                assert torch.equal(again[name], value), (grade, name)

    run_ranks(4, work)


def with_top_k(model: Model, top_k: int) -> Model:
    assert model.moe is not None
    return replace(model, moe=replace(model.moe, top_k=top_k, normalize_weights_p=None))


@pytest.mark.slow
def test_experts_get_the_same_rows_in_the_same_order() -> None:
    """Bit for bit, whatever they travel in; with one expert a token the loss is equal too."""

    def work(rank: Topology) -> None:
        glu, given = experts.grouped_glu, list[Tensor]()

        def grouped_glu(x_RD: Tensor, *others: Tensor, **keywords: bool) -> Tensor:
            given.append(x_RD.detach().clone())
            return glu(x_RD, *others, **keywords)

        experts.grouped_glu = grouped_glu  # in a test's own process
        bf16, fp32, fp8 = Precision.bf16, Precision.fp32, ExchangePrecision.fp8
        for top_k, precision, exchange in ((1, fp32, SAME), (4, bf16, SAME), (4, bf16, fp8)):
            given.clear()
            found, model = [], with_top_k(WIDE, top_k)
            for node in (None, NODE):
                decoder = make(
                    rank,
                    4,
                    KEPT,
                    interleave=False,
                    model=model,
                    exchange=exchange,
                    node=node,
                    precision=precision,
                )
                with torch.autocast("cpu", torch.bfloat16, enabled=precision is bf16):
                    found.append(train(decoder, rank)[0])
            assert len(given) == 2 and torch.equal(*given)
            straight, over_nodes = found
            # Rounded to 8 bits once more on the way.
            assert largest_error(over_nodes, straight) < (2e-6 if precision is fp32 else 2e-2)
            assert abs(over_nodes["loss"] / straight["loss"] - 1) <= (0 if precision is fp32 else 2e-4)

    run_ranks(4, work)


def test_copies_and_their_sums_follow_their_definition() -> None:
    """In float64, with rows of no copies, forward and backward."""
    keys_WS = torch.tensor([[2, 9, 0], [9, 9, 9], [9, 0, 9], [1, 2, 9]])
    copies = Copies.sorted_by(keys_WS, 9, 5)
    assert copies.rows_R.tolist() == [0, 2, 3, 0, 3]
    assert copies.slots_R.tolist() == [2, 7, 9, 0, 10]
    generator = torch.Generator().manual_seed(0)
    x_WD, weights_WS = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_() for x in (x_WD, weights_WS)]

    def both(x_WD: Tensor, weights_WS: Tensor) -> Tensor:
        copies_RD = copied(x_WD, copies)
        return summed(copies_RD, copies) + summed(copies_RD, copies, weights_WS)

    is_copy_WS = keys_WS < 9
    expected = x_WD * (is_copy_WS * (1 + weights_WS)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(both(*inputs), expected)
    assert torch.autograd.gradcheck(both, inputs)
