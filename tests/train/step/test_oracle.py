"""The real trainer against plain float64 of another hand: three steps, of two phases, from the loader on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composer.optim import DecoupledAdamW
from torch import Tensor

from launch.verify.loaded_input import build_loader, build_plan, draw_samples, with_phases
from launch.verify.watching import ReferenceRecord, WatchedStep, Writer
from tests.train.step.oracle import Oracle, OracleFigures, joined, rate_at
from train.checkpoint.files import Progress
from train.layout.optim import build_optimizer
from train.recipe.curriculum import plan_stages
from train.recipe.reading import load_recipe
from train.recipe.schema import Optimizer, Precision, Recipe
from train.recipe.tiny import tiny_recipe
from train.recipe.topology import Topology
from train.run import Machine, build_model
from train.trainer import build_trainer

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"
COMMON = (
    "model.init_std=0.2 model.clip_qkv=0.5 training.clip_norm=0.1 optimizer.eps=1e-6 "
    "optimizer.betas=[0.6,0.9] optimizer.weight_decay=0.5 optimizer.learning_rate=0.02 "
    "schedule.final_share=0.2"
)
EXPERTS = "model.moe.experts=4 model.moe.top_k=2"
RUNS = {
    "adamw, balance of the microbatch": f"{EXPERTS} model.moe.balance_scope=microbatch",
    "z-loss of logits": f"{EXPERTS} model.logit_z_loss_weight=0.05",
    "adamw, balance of the batch, rmsnorm": f"{EXPERTS} model.moe.balance_scope=global_batch "
    "model.norm=rmsnorm model.qk_norm=true model.qkv_bias=true model.rope_share=0.5 "
    "model.tie_embeddings=true model.moe.normalize_weights_p=2.0",
    "lion, balance by bias, wsd": f"{EXPERTS} model.moe.balance=bias model.moe.bias_update_rate=0.2 "
    "model.moe.normalize_weights_p=null optimizer.kind=lion schedule.kind=wsd schedule.decay_tokens=600000",
    "dense, alibi, one document": "model.moe=null model.position=alibi model.ffn=mlp model.n_kv_heads=4 "
    "training.document_masking=false",
    "dense, glu, responses": "model.moe=null optimizer.kind=lion training.loss_mean=targets",
    "multi-token prediction": f"{EXPERTS} model.mtp=true model.mtp_loss_weight=0.7 model.moe.balance=bias "
    # Not clipped: an element at the bound has its gradient in one precision and not in the other.
    "model.moe.bias_update_rate=0.2 model.clip_qkv=null",
    "multi-token prediction, responses, one document": f"{EXPERTS} model.mtp=true model.mtp_loss_weight=0.7 "
    "model.moe.balance=bias model.clip_qkv=null training.loss_mean=targets "
    # Gradients of rare tokens are near the usual eps.
    "training.document_masking=false optimizer.eps=1e-4",
}
Steps = list[tuple[OracleFigures, dict[str, Tensor]]]
LEAST_GAP = 1e-5
"""Between the scores of the last chosen and the first rejected expert; nearer ones fp32 may swap."""


def trained(recipe: Recipe, seed: int) -> ReferenceRecord:
    """Trains with the real trainer on one process, and returns what it computed."""
    record, topology, curriculum = ReferenceRecord(), Topology(), plan_stages(recipe)
    writer = Writer(record)
    model, optimizer = build_model(recipe, Machine(topology, "cpu", Precision.fp32))
    step = WatchedStep(writer, recipe, model, topology, curriculum)
    writer.expert_tokens = step.expert_tokens
    loader = build_loader(recipe, seed, topology)
    progress = Progress(0, 0, 0, 0.0)
    trainer = build_trainer(
        recipe, model, optimizer, loader, {}, [writer, step], [writer.figures], progress, curriculum
    )
    trainer.fit()
    trainer.close()
    return record


def expected(
    recipe: Recipe, weights: dict[str, Tensor], seed: int
) -> list[tuple[OracleFigures, dict[str, Tensor]]]:
    """The oracle's steps, and the weights after each."""
    oracle, plan, samples = Oracle(recipe, weights), build_plan(recipe), draw_samples(recipe, seed)
    S, first = recipe.data.sequence_tokens, 0
    lengths = [phase.tokens for phase in recipe.data.phases]
    found = []
    while first * S < sum(lengths):
        phase = recipe.data.phases[0 if first * S < lengths[0] else 1]
        assert phase.global_batch_sequences and phase.sequence_tokens and phase.microbatch_sequences
        per = phase.sequence_tokens // S
        count = phase.global_batch_sequences * per
        picks = plan.samples(first, count)
        picked = [
            (int(number), samples[plan.domains[domain]][number])
            for domain, number in zip(picks.domain.tolist(), picks.sample.tolist(), strict=True)
        ]
        first += count
        figures = oracle.step(
            joined([picked[at : at + per] for at in range(0, count, per)]),
            phase.rope_theta or recipe.model.rope_theta,
            rate_at(recipe, first * S, sum(lengths), phase.learning_rate_scale),
            phase.microbatch_sequences,
        )
        found.append((figures, {n: w.detach().clone() for n, w in oracle.weights.items()}))
    return found


def both(name: str) -> tuple[ReferenceRecord, Steps]:
    """A run, and what the oracle makes of it."""
    recipe = load_recipe(SMOKE, [*COMMON.split(), *RUNS[name].split()])
    recipe = with_phases(tiny_recipe(recipe, steps=3))
    asked = load_recipe(SMOKE, [*COMMON.split(), *RUNS[name].split()]).model.moe
    if asked is not None and recipe.model.moe is not None:
        # Noise is a hash of its own; the scope is the run's.
        moe = replace(recipe.model.moe, jitter_eps=0.0, balance_scope=asked.balance_scope)
        recipe = replace(recipe, model=replace(recipe.model, moe=moe))
    for seed in range(20):
        record = trained(recipe, seed)
        if record.least_gap > LEAST_GAP:
            return record, expected(recipe, record.weights[0], seed)
    raise AssertionError("every seed has near-ties")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_three_steps_are_those_of_the_oracle(name: str) -> None:
    record, steps = both(name)
    assert len(record.figures) == len(steps) == 3
    for step, (figures, weights) in enumerate(steps):
        found = record.figures[step]
        assert found["loss"] == pytest.approx(figures.language, rel=1e-5)
        assert found["norm"] == pytest.approx(figures.norm, rel=2e-5)
        assert found.get("mtp", 0.0) == pytest.approx(figures.mtp, rel=1e-5)
        assert found.get("logit_z") == (
            pytest.approx(figures.logit_z, rel=1e-4) if name == "z-loss of logits" else None
        )
        assert (figures.mtp > 1) == name.startswith("multi-token prediction")
        if figures.counts:
            assert found["balance"] == pytest.approx(figures.balance, rel=1e-5)
            assert found["z"] == pytest.approx(figures.z, rel=1e-5)
            choices_LE = record.choices[step]
            assert choices_LE is not None and torch.equal(choices_LE.double(), torch.stack(figures.counts))
        assert_near(record.gradients[step], figures.gradients, 1e-4)
        assert_near(record.clipped[step], figures.clipped, 1e-4)
        assert_near(record.weights[step + 1], weights, 1e-4)


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Compares tensor by tensor."""
    assert found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        error = float((found[name].double() - theirs).norm()) / (float(theirs.norm()) or 1.0)
        assert error < bound, f"{name}: {error:.1e}"


def test_adamw_is_composers() -> None:
    """A second published implementation, which decays by the rate's share of its peak."""
    rate, decay, betas, eps = 0.01, 0.1, (0.8, 0.9), 1e-6
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 7, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    recipe = Optimizer(learning_rate=rate, weight_decay=decay, betas=list(betas), eps=eps)
    optimizers = (
        build_optimizer(ours, recipe),
        DecoupledAdamW(theirs.parameters(), lr=rate, betas=betas, eps=eps, weight_decay=decay * rate),
    )
    for share in (1.0, 0.5, 0.8, 0.3):
        gradient = torch.randn(7, 5, generator=generator)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            module.weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
