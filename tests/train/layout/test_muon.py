"""Muon against its papers' formula by singular values, torch's own, and one process by any layout."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from launch.verify.forked_ranks import run_ranks
from tests.fake_world import CFG, whole
from train.layout.mesh import build_mesh, build_sharded
from train.layout.muon import COEFFICIENTS, orthogonalize
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.model.init import initialize, own_part
from train.recipe import sizes
from train.recipe.matrices import Stack, is_orthogonalised, rounds, stacked_rows
from train.recipe.schema import Moe, Optimizer, OptimizerKind, Parallelism, Precision
from train.recipe.topology import Topology

MUON = Optimizer(kind=OptimizerKind.muon, learning_rate=0.02, weight_decay=0.1, adamw_learning_rate=0.005)
UNEVEN = replace(CFG, moe=Moe(experts=6, top_k=2))
"""Four ranks cut through its experts."""


def by_singular_values(x: Tensor, steps: int = 5) -> Tensor:
    """The polynomial of Newton-Schulz, applied to the singular values in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 6, 6)])
def test_orthogonalising_maps_singular_values(shape: tuple[int, int, int]) -> None:
    x_BRC = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([by_singular_values(x) for x in x_BRC])
    torch.testing.assert_close(orthogonalize(x_BRC), expected)
    values = torch.linalg.svdvals(orthogonalize(x_BRC))
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(shape)).any()


def test_muon_follows_its_papers() -> None:
    """Momentum as Jordan et al. write it; scale and decay as Liu et al. do; the norm is AdamW's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3, bias=False)).double()
    optimizer = build_optimizer(model, MUON)
    w, norm = (p.detach().clone() for p in model.parameters())
    buffer = torch.zeros_like(w)
    rest = nn.Parameter(norm)
    adamw = torch.optim.AdamW([rest], lr=0.005, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in model.parameters()]
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        rest.grad = gradients[1]
        adamw.step()
        buffer = 0.95 * buffer + gradients[0]
        direction = by_singular_values(gradients[0] + 0.95 * buffer)
        w = w - 0.02 * (0.2 * 4**0.5 * direction + 0.1 * w)
    torch.testing.assert_close(list(model.parameters()), [nn.Parameter(w), rest])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_where_torch_has_it(nesterov: bool) -> None:
    """Torch's rounds to bf16 in each product."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(48, 20, bias=False), nn.Linear(48, 20, bias=False)
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    optimizer = build_optimizer(ours, replace(MUON, nesterov=nesterov))
    other = torch.optim.Muon(
        theirs.parameters(), lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.weight.grad = torch.randn_like(ours.weight)
        theirs.weight.grad = ours.weight.grad.clone()
        optimizer.step()
        other.step()
    error = torch.linalg.vector_norm(ours.weight - theirs.weight)
    assert error < 0.02 * torch.linalg.vector_norm(ours.weight - before)


def test_each_expert_and_projection_is_a_matrix_and_the_rest_is_adamws() -> None:
    decoder = Decoder(CFG)
    initialize(decoder, CFG, 3)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    optimizer = build_optimizer(decoder, replace(MUON, weight_decay=0.0))
    gradients = {name: torch.randn_like(p) for name, p in decoder.named_parameters()}
    for name, p in decoder.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    rows = {"experts": [24] * 8, "Wqkv": [16, 8, 8], "out_proj": [16]}
    for name, p in decoder.named_parameters():
        kind = next((kind for kind in rows if kind in name), None)
        assert ("momentum_buffer" in optimizer.state[p]) == (kind is not None), name
        moved = (before[name] - p).detach()
        if kind is None:
            torch.testing.assert_close(moved, 0.005 * gradients[name].sign(), rtol=1e-3, atol=1e-6)
            continue
        for part, gradient in zip(moved.split(rows[kind]), gradients[name].split(rows[kind]), strict=True):
            expected = 0.02 * 0.2 * max(part.shape) ** 0.5 * by_singular_values(gradient)
            torch.testing.assert_close(part.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("most_elements", [1, 100, 2**26])
@pytest.mark.parametrize("ranks", [1, 3, 4, 16])
def test_every_matrix_has_one_rank_and_none_has_much_more_than_others(ranks: int, most_elements: int) -> None:
    stacks = [Stack((5,) * 6, 4), Stack((8, 4, 4), 8), Stack((7,), 3), Stack((5,) * 16, 4)]
    found = rounds(stacks, ranks, most_elements)
    seen = [(m.stack, m.first) for each in found for owned in each.owned for m in owned]
    expected = [(n, sum(s.rows[:i])) for n, s in enumerate(stacks) for i in range(len(s.rows))]
    assert sorted(seen) == expected
    for each in found:
        shapes = {(m.rows, m.columns) for owned in each.owned for m in owned}
        assert len(shapes) == 1
        counts = [len(owned) for owned in each.owned]
        (shape,) = shapes
        assert max(counts) * shape[0] * shape[1] <= max(most_elements, shape[0] * shape[1])
        if each.travels:
            assert max(counts) - min(counts) <= 1
        else:
            for rank, owned in enumerate(each.owned):
                for m in owned:
                    start, end = stacks[m.stack].bounds(ranks, rank)
                    assert start <= m.first and m.first + m.rows <= end


def test_what_is_orthogonalised_is_known_without_torch() -> None:
    for cfg in (CFG, replace(CFG, moe=None, tie_embeddings=True)):
        decoder = Decoder(cfg)
        optimizer = build_optimizer(decoder, MUON)
        names = {parameter: name for name, parameter in decoder.named_parameters()}
        for weight in sizes.weights(cfg):
            parameter = decoder.get_parameter(weight.name)
            group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
            assert group["orthogonal"] == is_orthogonalised(weight.name, weight.shape), names[parameter]
            assert sum(stacked_rows(cfg, weight.name, weight.shape[0])) == weight.shape[0]


def stepped(layout: Parallelism | None, optimizer_recipe: Optimizer = MUON) -> dict[str, list[float]]:
    """Weights after two steps with gradients that depend only on the place in the whole weight."""
    if layout is None:
        decoder = Decoder(UNEVEN)
        initialize(decoder, UNEVEN, 3)
    else:
        decoder = Decoder(UNEVEN, device="meta")
        build_sharded(decoder, build_mesh(layout, 4, "cpu"), Precision.fp32, 3)
    optimizer = build_optimizer(decoder, optimizer_recipe)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for weight in sizes.weights(UNEVEN):
            parameter, full = (
                decoder.get_parameter(weight.name),
                torch.randn(weight.shape, generator=generator),
            )
            parameter.grad = torch.zeros_like(parameter)
            local, first, _ = own_part(parameter.grad)
            local.copy_(full[first : first + len(local)])
        optimizer.step()
    return {name: whole(p).detach().tolist() for name, p in decoder.named_parameters()}


LAYOUTS = [
    Parallelism(),
    Parallelism(expert=2),
    Parallelism(replicate=2),
    Parallelism(replicate=2, expert=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_that_share_matrices_update_them_as_one_process_does(layout: Parallelism) -> None:
    expected = stepped(None)

    def work(_: Topology) -> dict[str, list[float]]:
        return stepped(layout)

    for found in run_ranks(4, work):
        for name, values in expected.items():
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(values), rtol=1e-4, atol=1e-6, msg=name
            )
