"""A weight's hyperparameters are saved and compared, whatever group of parameters it is in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint.files import STATE_FOLDER, Progress
from train.checkpoint.groups import first_difference, hyperparameters_of, read_hyperparameters
from train.checkpoint.saver import CheckpointSaver
from train.layout.optim import build_optimizer
from train.recipe.errors import UserError
from train.recipe.schema import Optimizer, OptimizerKind
from train.recipe.topology import Topology
from train.start.resume import require_same_groups

MUON = Optimizer(kind=OptimizerKind.muon, learning_rate=0.02, adamw_learning_rate=0.01)


def _model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.LayerNorm(3, bias=False))


def test_each_weights_own_rate_is_saved_and_a_change_refused(tmp_path: Path) -> None:
    model = _model()
    saver = CheckpointSaver(tmp_path, Topology(), keep_last=1)
    saver.start(model, build_optimizer(model, MUON), Progress(1, 8, 80, 1.5))
    saved = saver.wait()
    assert saved is not None and saved.folder is not None
    found = read_hyperparameters(saved.folder / STATE_FOLDER)
    assert (found["0.weight"]["lr_scale"], found["1.weight"]["lr_scale"]) == (1.0, 0.5)
    assert (found["0.weight"]["weight_decay"], found["1.weight"]["weight_decay"]) == (0.1, 0.0)
    assert found["0.weight"]["betas"] == [0.9, 0.95] and found["0.weight"]["orthogonal"]
    require_same_groups(saved.folder, model, build_optimizer(model, MUON))
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"adamw_learning_rate": 0.02}, r"lr_scale of 1\.weight was 0\.5 and is 1\.0"),
        ({"momentum": 0.9}, r"momentum of 0\.weight was 0\.95 and is 0\.9"),
        ({"weight_decay": 0.2}, r"weight_decay of 0\.weight was 0\.1 and is 0\.2"),
        ({"kind": OptimizerKind.adamw}, r"lr_scale of 1\.weight was 0\.5 and is 1\.0"),
    )
    for change, words in changes:
        with pytest.raises(UserError, match=f"optimizer: .*: {words}; resume with"):
            require_same_groups(saved.folder, model, build_optimizer(model, replace(MUON, **change)))


def test_other_groups_of_the_same_weights_do_not_differ() -> None:
    """As under another layout, or of a version that did not know of a hyperparameter."""
    model = _model()
    optimizer = build_optimizer(model, MUON)
    whole = hyperparameters_of(model, optimizer.param_groups)
    (first, second) = optimizer.param_groups
    assert first_difference(whole, hyperparameters_of(model, [second, first])) == ""
    older = {name: {k: v for k, v in each.items() if k != "lr_scale"} for name, each in whole.items()}
    assert first_difference(older, whole) == ""
