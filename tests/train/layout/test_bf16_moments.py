"""Moments in bf16: their rounding is exact on average, and the same under every layout and after a resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.verify.forked_ranks import run_ranks
from tests.train.layout.test_muon import LAYOUTS, stepped
from train.layout.bf16_moments import MOMENTS, round_stochastically
from train.layout.optim import build_optimizer
from train.recipe.schema import Moments, Optimizer, Parallelism
from train.recipe.topology import Topology

BF16 = Optimizer(learning_rate=0.01, moments=Moments.bf16)


def test_a_number_is_rounded_to_its_neighbours_and_to_itself_on_average() -> None:
    bits = torch.arange(2**16, dtype=torch.int32)
    for number in (1.001, -3.14159, 2.5e-30, 1.99999):
        x = torch.tensor(number)
        rounded = round_stochastically(x.expand(len(bits)).contiguous(), bits)
        low, high = sorted(set(rounded.tolist()))
        assert low < x < high and torch.tensor([low], dtype=torch.bfloat16).item() == low
        assert high - low <= 2.0**-7 * abs(high)
        assert rounded.double().mean().item() == pytest.approx(x.item(), rel=1e-9)
    assert (round_stochastically(torch.full((len(bits),), 1.5), bits) == 1.5).all()


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_it_is_adamw_but_for_the_rounding_of_moments(eps: float) -> None:
    torch.manual_seed(0)
    recipe = replace(BF16, eps=eps)
    ours, theirs = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizer, other = (
        build_optimizer(ours, recipe),
        build_optimizer(theirs, replace(recipe, moments=Moments.fp32)),
    )
    gradients, start = torch.randn(40, 32, 64), theirs.weight.detach().clone()
    first, *rest = gradients
    for gradient in (first, *rest):
        for model, each in ((ours, optimizer), (theirs, other)):
            model.weight.grad = gradient.clone()
            each.step()
        if gradient is first:  # No moment that was rounded has moved a weight yet.
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-7)
    moved = torch.linalg.vector_norm(theirs.weight - start)
    assert torch.linalg.vector_norm(ours.weight - theirs.weight) < 0.02 * moved
    held, exact = optimizer.state[ours.weight], other.state[theirs.weight]
    for name in MOMENTS:
        assert held[name].dtype == torch.bfloat16
        error = held[name].double() - exact[name]
        assert error.abs().mean() < 2**-7 * exact[name].abs().mean()
        # Errors of many elements and steps are random: their mean is far below that of one.
        assert error.mean().abs() < 0.1 * error.abs().mean()


def test_a_moment_follows_changes_that_rounding_to_the_nearest_would_lose() -> None:
    """A second moment of 1 under gradients of 0: with a beta of 0.999 every step is below half of bf16's."""
    weight = nn.Parameter(torch.zeros(4096))
    model = nn.ParameterList([weight])
    optimizer = build_optimizer(model, replace(BF16, betas=[0.9, 0.999]))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
    for _ in range(200):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].double().mean().item() == pytest.approx(0.999**200, rel=5e-3)
    assert torch.tensor(0.999).bfloat16() == 1


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(16, 8, bias=False)
        return model, build_optimizer(model, BF16, seed=3)

    (one, optimizer), (two, other) = build(), build()
    gradients = torch.randn(4, 8, 16)
    for step, gradient in enumerate(gradients):
        one.weight.grad = gradient.clone()
        optimizer.step()
        if step == 1:
            torch.save((one.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt")
    two.load_state_dict(weights)
    other.load_state_dict(state)
    assert all(other.state[two.weight][name].dtype == torch.bfloat16 for name in MOMENTS)
    for gradient in gradients[2:]:
        two.weight.grad = gradient.clone()
        other.step()
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(optimizer.state[one.weight]["exp_avg_sq"], other.state[two.weight]["exp_avg_sq"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1::2], ids=str)
def test_every_layout_rounds_alike(layout: Parallelism) -> None:
    expected = stepped(None, BF16)

    def work(_: Topology) -> bool:
        return stepped(layout, BF16) == expected

    assert run_ranks(4, work) == [True] * 4
