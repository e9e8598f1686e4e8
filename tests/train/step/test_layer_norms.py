"""Norms by layer are those of the whole model's tensors, under every layout; a profile has its batches."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.verify.forked_ranks import Ranks
from launch.verify.tiny_runs import import_for_runs
from train.recipe.rules import validate
from train.recipe.schema import Recipe
from train.recipe.topology import Topology
from train.record import metrics
from train.record.step_log import read_steps

pytestmark = pytest.mark.slow

TinyRecipe = Callable[..., Recipe]
KEYS = (metrics.LAYER_GRADIENT, metrics.LAYER_UPDATE, metrics.LAYER_WEIGHTS, metrics.LAYER_ACTIVATION)
OVERRIDES = (
    "training.duration_tokens=3072",
    "schedule.warmup_tokens=512",
    "tracking.layer_norms_interval_batches=3",
    "training.recompute=layer",
    "training.microbatch_sequences=2",
    "model.moe.balance_scope=global_batch",
)


STAGES = "parallelism.pipeline=2"


def _norms(recipe: Recipe) -> dict[int, dict[str, float]]:
    """The layers' figures by step, of the steps that have some."""
    steps = read_steps(Path(recipe.runs_dir) / recipe.name / "metrics.jsonl")
    found = {step["step"]: {k: v for k, v in step.items() if k.startswith("layers/")} for step in steps}
    return {step: figures for step, figures in found.items() if figures}


def _run(
    recipe: Recipe, ranks: int, change: Callable[[], None] = lambda: None
) -> dict[int, dict[str, float]]:
    from train.run import run

    validate(recipe, Topology(0, ranks, 0, ranks), recipe.name)
    import_for_runs()

    def work(topology: Topology) -> None:
        change()
        assert run(recipe, topology) == 0

    log = Path(recipe.runs_dir) / f"{recipe.name}.log"
    with Ranks(ranks, work, log) as processes:
        assert set(processes.exit_codes(240)) == {0}, log.read_text()[-2000:]
    return _norms(recipe)


def _norm(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors]).norm().item()


def test_norms_of_layers_are_those_of_the_whole_model(tmp_path: Path, tiny_recipe: TinyRecipe) -> None:
    truth = tmp_path / "truth.json"

    def also_measured_plainly() -> None:
        """Measures the same with plain PyTorch: every parameter by itself, outputs by Block's own method."""
        from train.model.decoder import Block
        from train.step.step import TrainingStep

        plain: dict[str, list[float]] = {}
        outputs: list[Tensor] = []
        whole, clip, end = Block._whole, TrainingStep.clip, TrainingStep.batch_end

        def noted(self: Block, *given: Any) -> Any:
            result = whole(self, *given)
            if self.training:
                outputs.append(result[0].detach().clone())
            return result

        def clipped(self: TrainingStep) -> Tensor:
            found = clip(self)
            blocks = self.model.decoder.transformer.blocks
            plain["gradient_norm"] = [_norm([p.grad for p in block.parameters()]) for block in blocks]  # type: ignore[misc]
            plain["before"] = [[p.detach().clone() for p in block.parameters()] for block in blocks]  # type: ignore[misc]
            return found

        def ended(self: TrainingStep, state: Any, logger: Any) -> None:
            end(self, state, logger)
            blocks = self.model.decoder.transformer.blocks
            layers = range(len(blocks))
            first = outputs[: len(blocks)]
            plain["weight_norm"] = [_norm(list(block.parameters())) for block in blocks]
            plain["update_norm"] = [
                _norm([p - q for p, q in zip(blocks[n].parameters(), plain["before"][n], strict=True)])  # type: ignore[arg-type]
                for n in layers
            ]
            plain["activation_rms"] = [x.double().square().mean().sqrt().item() for x in first]
            outputs.clear()
            if state.timestamp.batch.value == 3:
                truth.write_text(json.dumps({k: v for k, v in plain.items() if k != "before"}))

        Block._whole = noted  # type: ignore[method-assign]
        TrainingStep.clip = clipped  # type: ignore[method-assign]
        TrainingStep.batch_end = ended  # type: ignore[method-assign]

    one = _run(tiny_recipe(tmp_path, tmp_path / "shards", "one", *OVERRIDES), 1, also_measured_plainly)
    assert list(one) == [3, 6]
    expected = json.loads(truth.read_text())
    assert len(one[3]) == 2 * len(KEYS)
    for key in KEYS:
        for layer in (0, 1):
            value = expected[key.rsplit("/", 1)[1]][layer]
            assert one[3][metrics.of_layer(key, layer)] == pytest.approx(value, rel=1e-5), key
    apart = ("parallelism.expert=2", "training.profile_batches=[2,3]", "training.profile_ranks=[1]")
    two = _run(tiny_recipe(tmp_path, tmp_path / "shards", "two", *OVERRIDES, *apart), 2)
    sharded = [key for key in one[3] if not key.endswith("activation_rms")]  # Rank 0 has other samples.
    for step in (3, 6):
        expected = {key: one[step][key] for key in sharded}
        assert {key: two[step][key] for key in sharded} == pytest.approx(expected, rel=1e-3)
    _require_trace(tmp_path / "two/profile")
    _require_stages_alike(tiny_recipe(tmp_path, tmp_path / "shards", "stages", *OVERRIDES, STAGES), one)


def _require_stages_alike(recipe: Recipe, one: dict[int, dict[str, float]]) -> None:
    """Asserts that rank 0 logs what both stages of one layer each have seen of the same samples."""
    stages = _run(recipe, 2)
    for step in (3, 6):
        assert stages[step] == pytest.approx(one[step], rel=1e-3)


def _require_trace(folder: Path) -> None:
    """Asserts that rank 1 wrote the trace of both batches that were asked for."""
    traces = list(folder.iterdir())
    assert [trace.name for trace in traces] == ["rank-1.trace.json.gz"]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert "aten::mm" in names
    assert len([name for name in names if name.startswith("Optimizer.step#")]) == 2
