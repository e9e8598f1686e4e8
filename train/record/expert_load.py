"""Expert load: the distribution of a batch's tokens over the experts of each layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from train.record import metrics
from train.record.step_log import EXPERT_LOAD_FILE, SHARES, StepLog

# Shapes: L layers, E experts.

HEAT_MAP_COLUMNS = 400


@dataclass(frozen=True)
class LayerLoad:
    """The load of one layer's experts."""

    busiest: float
    """Share of the token assignments that the busiest expert took; 1 / E when balanced."""
    idlest: float
    """Share that the idlest expert took."""
    entropy: float
    """Entropy of the shares over ln E: 1 when balanced, 0 when one expert takes all."""
    dead: int
    """Number of experts without tokens."""


def measure_load(counts_LE: Tensor) -> list[LayerLoad]:
    """Measures the load of each layer.

    Args:
        counts_LE: tokens per expert; int64.
    """
    counts_LE = counts_LE.to("cpu", torch.float64)
    experts = counts_LE.shape[1]
    shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
    entropy_L = torch.special.entr(shares_LE).sum(dim=1) / math.log(max(experts, 2))
    return [
        LayerLoad(
            busiest=shares_LE[layer].max().item(),
            idlest=shares_LE[layer].min().item(),
            entropy=entropy_L[layer].item(),
            dead=int((counts_LE[layer] == 0).sum()),
        )
        for layer in range(counts_LE.shape[0])
    ]


class ExpertLoad(Callback):
    """Logs each layer's load at every step and records the shares of all experts for the report's heat map.

    For rank 0 only.

    Args:
        run_dir: folder of the run; shares go to ``expert_load.jsonl`` in it.
        total_batches: length of the run; shares are recorded at about 400 evenly spaced steps, as many as a
            heat map can show, so that a long run of a large model takes megabytes instead of gigabytes.
        expert_tokens: returns the last batch's tokens per expert over all ranks, [L, E]; None for a dense
            model.
    """

    def __init__(self, run_dir: Path, total_batches: int, expert_tokens: Callable[[], Tensor | None]) -> None:
        self.expert_tokens = expert_tokens
        self.log = StepLog(run_dir / EXPERT_LOAD_FILE)
        self.interval_batches = max(1, -(-total_batches // HEAT_MAP_COLUMNS))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drops records of batches that will be trained again."""
        self.log.drop_after(state.timestamp.batch.value)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs the batch's spread."""
        counts_LE = self.expert_tokens()
        if counts_LE is None:
            return
        counts_LE = counts_LE.cpu()
        figures: dict[str, float] = {}
        for layer, load in enumerate(measure_load(counts_LE)):
            figures[metrics.of_layer(metrics.EXPERT_BUSIEST, layer)] = load.busiest
            figures[metrics.of_layer(metrics.EXPERT_IDLEST, layer)] = load.idlest
            figures[metrics.of_layer(metrics.EXPERT_ENTROPY, layer)] = load.entropy
            figures[metrics.of_layer(metrics.EXPERT_DEAD, layer)] = load.dead
        logger.log_metrics(figures)
        batch = state.timestamp.batch.value
        if batch % self.interval_batches == 0:
            shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
            rounded = [[round(share, 5) for share in layer] for layer in shares_LE.tolist()]
            self.log.write(batch, {SHARES: rounded})

    def close(self, state: State, logger: Logger) -> None:
        """Closes the file."""
        self.log.close()
