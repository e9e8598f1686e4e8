"""Figures of layers folded into one each: a chart for the model in MLflow, where 40 layers would have 160."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from train.record import metrics

FEW_LAYERS = 4
"""Models of so few layers keep a chart for each."""
_FOLDS: dict[str, Callable[[Iterable[float]], float]] = {
    metrics.EXPERT_BUSIEST: max,
    metrics.EXPERT_IDLEST: min,
    metrics.EXPERT_ENTROPY: min,
    metrics.EXPERT_DEAD: sum,
    metrics.LAYER_GRADIENT: max,
    metrics.LAYER_UPDATE: max,
    metrics.LAYER_WEIGHTS: max,
    metrics.LAYER_ACTIVATION: max,
}
FOLDED = {key.replace("LAYER/", "") for key in _FOLDS}
"""Keys of folded figures: the worst layer's, and the number of idle experts in all."""
_OF_LAYER = re.compile(r"(experts|layers)/(\d+)/(\w+)")


def folded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a step's figures with those of layers folded; the report draws each layer.

    Args:
        fields: a line of metrics.jsonl; values that are not finite are None.
    """
    kept: dict[str, Any] = {}
    of_layers: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        if found := _OF_LAYER.fullmatch(key):
            of_layers.setdefault(f"{found[1]}/LAYER/{found[3]}", {})[key] = value
        else:
            kept[key] = value
    for template, values in of_layers.items():
        finite = [value for value in values.values() if isinstance(value, int | float)]
        if len(values) <= FEW_LAYERS or template not in _FOLDS:
            kept |= values
        else:
            kept[template.replace("LAYER/", "")] = _FOLDS[template](finite) if finite else None
    return kept
