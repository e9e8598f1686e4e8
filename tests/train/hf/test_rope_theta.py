"""The RoPE base of a checkpoint is that of the phase in which it was saved."""

import dataclasses
import json
from pathlib import Path

import pytest

from train.checkpoint.files import PROGRESS_FILE, Progress
from train.hf.weights import rope_theta_at
from train.recipe.curriculum import plan_stages, to_json
from train.recipe.schema import Data, Model, Phase, Recipe, Training


@pytest.mark.parametrize(("batch", "theta"), [(1, 5e5), (4, 5e5), (5, 5e6), (8, 5e6)])
def test_it_is_that_of_the_last_batch_trained(tmp_path: Path, batch: int, theta: float) -> None:
    phases = [Phase(tokens=128, weights={"a": 1.0}), Phase(tokens=128, weights={"a": 1.0}, rope_theta=5e6)]
    recipe = Recipe(
        data=Data(shards="x", phases=phases, sequence_tokens=16),
        training=Training(duration_tokens=256, global_batch_sequences=2, microbatch_sequences=2),
    )
    progress = Progress(batch, 2 * batch, 32 * batch, 0.0, to_json(plan_stages(recipe)))
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(dataclasses.asdict(progress)))
    assert rope_theta_at(tmp_path, Model()) == theta
