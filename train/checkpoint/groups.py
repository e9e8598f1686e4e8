"""Hyperparameters of each weight in a checkpoint, compared with those that a run continues with.

A checkpoint saves its optimizer's parameter groups, but a layout may have other groups than the one that
saved them: so a run keeps its own, which are the recipe's, and they are compared weight by weight.
"""

from pathlib import Path
from typing import Any

from torch import nn

from train.checkpoint.reading import CheckpointReader

GROUPS = "optimizer.param_groups."
COMPARED = ("lr_scale", "weight_decay", "betas", "eps", "momentum", "nesterov", "orthogonal")
"""Settings of a group besides its rate, which follows the schedule times ``lr_scale``."""

Hyperparameters = dict[str, dict[str, Any]]
"""By the weight's name and the hyperparameter's."""


def read_hyperparameters(state: Path) -> Hyperparameters:
    """Reads the hyperparameters of every weight from the folder of a checkpoint's sharded state."""
    reader = CheckpointReader(state)
    names = [name for name in reader.metadata.state_dict_metadata if name.startswith(GROUPS)]
    values: dict[str, Any] = dict.fromkeys(names)
    reader.load(values)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        number, _, key = name.removeprefix(GROUPS).partition(".")
        groups.setdefault(number, {})[key] = value
    return {
        weight: {key: _plain(group[key]) for key in COMPARED if key in group}
        for group in groups.values()
        for weight in group.get("params", [])
    }


def hyperparameters_of(model: nn.Module, groups: list[dict[str, Any]]) -> Hyperparameters:
    """Returns the hyperparameters of every weight in an optimizer's parameter groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: _plain(group[key]) for key in COMPARED if key in group}
        for group in groups
        for parameter in group["params"]
    }


def first_difference(before: Hyperparameters, now: Hyperparameters) -> str:
    """Returns the first weight that is trained otherwise than before, or an empty string.

    What one side does not know, such as a checkpoint of an earlier version, is not compared.
    """
    for name in sorted(before.keys() & now.keys()):
        for key in COMPARED:
            was, value = before[name].get(key), now[name].get(key)
            if was is not None and value is not None and was != value:
                return f"{key} of {name} was {was} and is {value}"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
