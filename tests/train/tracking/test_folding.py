"""Figures of layers are folded into one chart each; other loggers get our names."""

from types import SimpleNamespace
from typing import cast

from composer.core import State
from composer.loggers import InMemoryLogger, Logger

from train.record import metrics
from train.tracking.folding import FEW_LAYERS, FOLDED, folded
from train.tracking.loggers import with_our_names


def test_figures_of_many_layers_are_one_and_those_of_few_stay() -> None:
    layers = range(FEW_LAYERS + 1)
    busiest = {metrics.of_layer(metrics.EXPERT_BUSIEST, layer): 0.1 * layer for layer in layers}
    idlest = {metrics.of_layer(metrics.EXPERT_IDLEST, layer): 1.0 - 0.1 * layer for layer in layers}
    dead = {metrics.of_layer(metrics.EXPERT_DEAD, layer): layer for layer in layers}
    norms = {metrics.of_layer(metrics.LAYER_GRADIENT, layer): None for layer in layers}
    line = {"step": 3, metrics.LOSS: 2.0, **busiest, **idlest, **dead, **norms}
    assert folded(line) == {
        "step": 3,
        metrics.LOSS: 2.0,
        "experts/busiest": busiest["experts/4/busiest"],
        "experts/idlest": idlest["experts/4/idlest"],
        "experts/dead": 10,
        "layers/gradient_norm": None,
    }
    assert {"experts/busiest", "experts/idlest", "experts/dead", "layers/gradient_norm"} <= FOLDED
    few = {key: value for key, value in line.items() if not key.startswith(("experts/4", "layers/4"))}
    assert folded(few) == few


def test_other_loggers_get_our_metrics_under_our_names() -> None:
    kept = with_our_names(InMemoryLogger)()
    state = cast(State, SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=7))))
    logger = Logger(state, destinations=[kept])
    kept.init(state, logger)
    figures = {"loss/train/language": 2.5, "metrics/validation/code/token_loss": 3.0, "trainer/epoch": 1.0}
    logger.log_metrics(figures)
    values = {key: [value for _, value in pairs] for key, pairs in kept.data.items()}
    assert values == {metrics.LOSS: [2.5], metrics.validation_loss("code"): [3.0]}
