"""Optimizers against their formulas, schedules at their breakpoints, clipping against PyTorch's."""

import pytest
import torch
from torch import Tensor, nn

from train.layout.optim import build_optimizer, clip_gradients, learning_rate_share
from train.recipe.schema import Decay, Optimizer, OptimizerKind, Schedule, ScheduleKind


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    # float64: gradients through a norm are small differences, and Adam would magnify their rounding.
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3, bias=False)).double()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(8.0).double().view(2, 4)).square().sum().backward()
    optimizer.step()


def test_adamw_follows_its_paper() -> None:
    lr, wd, b1, b2, eps = 0.01, 0.1, 0.9, 0.95, 1e-8
    model, reference = _model(), _model()
    optimizer = build_optimizer(model, Optimizer(learning_rate=lr, weight_decay=wd, eps=eps))
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in reference.named_parameters()}
    for t in range(1, 4):
        _step(model, optimizer)
        reference.zero_grad()
        reference(torch.arange(8.0).double().view(2, 4)).square().sum().backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                assert p.grad is not None
                m, v = moments[name]
                m.lerp_(p.grad, 1 - b1)
                v.lerp_(p.grad**2, 1 - b2)
                decay = wd if p.ndim > 1 else 0.0
                p.mul_(1 - lr * decay).sub_(lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps))
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))


def test_lion_follows_its_paper_and_decays_as_adamw_does() -> None:
    """Gradients change their signs, without which the betas could be swapped."""
    lr, wd, b1, b2 = 0.01, 0.1, 0.6, 0.9
    model, reference = _model(), _model()
    optimizer = build_optimizer(
        model, Optimizer(kind=OptimizerKind.lion, learning_rate=lr, weight_decay=wd, betas=[b1, b2])
    )
    momentum = {n: torch.zeros_like(p) for n, p in reference.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for share in (1.0, 0.5, 0.8, 0.3, 1.0, 0.7):
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        gradients = {
            name: torch.randn(p.shape, generator=generator).double() for name, p in model.named_parameters()
        }
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.step()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                decay = wd if p.ndim > 1 else 0.0
                update = (b1 * momentum[name] + (1 - b1) * gradients[name]).sign()
                p.mul_(1 - lr * share * decay).sub_(lr * share * update)
                momentum[name].lerp_(gradients[name], 1 - b2)
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        (ScheduleKind.cosine, 0, 0.0),
        (ScheduleKind.cosine, 50, 0.5),
        (ScheduleKind.cosine, 100, 1.0),
        (ScheduleKind.cosine, 550, 0.55),
        (ScheduleKind.cosine, 1000, 0.1),
        (ScheduleKind.wsd, 50, 0.5),
        (ScheduleKind.wsd, 100, 1.0),
        (ScheduleKind.wsd, 800, 1.0),
        (ScheduleKind.wsd, 900, 0.55),
        (ScheduleKind.wsd, 1000, 0.1),
    ],
)
def test_schedule_at_its_corners(kind: ScheduleKind, tokens: int, expected: float) -> None:
    schedule = Schedule(kind=kind, warmup_tokens=100, decay_tokens=200, final_share=0.1)
    assert learning_rate_share(tokens, 1000, schedule) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("decay", "shares"),
    [
        (Decay.linear, [1.0, 1.0, 0.75, 0.5, 0.0]),
        (Decay.sqrt, [1.0, 1.0, 0.5, 1 - 0.5**0.5, 0.0]),
        (Decay.cosine, [1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, 0.0]),
    ],
)
def test_shapes_of_a_decay_to_zero(decay: Decay, shares: list[float]) -> None:
    schedule = Schedule(
        kind=ScheduleKind.wsd, warmup_tokens=100, decay_tokens=400, final_share=0.0, decay=decay
    )
    found = [learning_rate_share(tokens, 1000, schedule) for tokens in (100, 600, 700, 800, 1000)]
    assert found == pytest.approx(shares)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_an_average_follows_the_weights_that_were_updated(kind: OptimizerKind) -> None:
    model = _model().float()
    optimizer = build_optimizer(model, Optimizer(kind=kind, learning_rate=0.01, average_decay=0.75))
    weights = list(model.parameters())
    expected: list[Tensor] = []
    for step in range(4):
        optimizer.zero_grad()
        if step != 2:  # The guard drops all gradients of a batch whose update is skipped.
            model(torch.arange(8.0).view(2, 4)).square().sum().backward()
        optimizer.step()
        if step == 0:
            expected = [p.detach().clone() for p in weights]
        elif step != 2:
            expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, weights, strict=True)]
    torch.testing.assert_close([optimizer.state[p]["average"] for p in weights], expected)
    assert not torch.equal(expected[0], weights[0].detach())


@pytest.mark.parametrize(("max_norm", "scale"), [(None, 1.0), (0.1, 1.0), (1e6, 1.0), (1e-6, 1e-7)])
def test_clipping_equals_pytorchs_on_one_process(max_norm: float | None, scale: float) -> None:
    """Also where the norm is as small as what keeps it from zero."""
    models = _model(), _model()
    for model in models:
        (scale * model(torch.arange(8.0).double().view(2, 4)).square().sum()).backward()
    norm = clip_gradients(models[0].parameters(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(models[1].parameters(), max_norm or float("inf"))
    torch.testing.assert_close(norm.double(), expected)
    torch.testing.assert_close(
        [p.grad for p in models[0].parameters()],
        [p.grad for p in models[1].parameters()],
        rtol=1e-6,
        atol=0.0,
    )
