"""The decoder as a Composer model: the microbatch model and its validation loss."""

from collections.abc import Callable
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from train.model.decoder import Decoder, DecoderOutput
from train.recipe.schema import Precision, Recipe
from train.step.microbatch import Batch, MicrobatchModel


class TokenLoss(Metric):
    """Mean cross-entropy per token in nats, exact over batches of unequal size and over ranks."""

    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: DecoderOutput) -> None:
        """Adds a batch's summed loss and its number of targets."""
        self.loss_sum += outputs.loss_sum.double()
        self.tokens += outputs.target_tokens

    def compute(self) -> Tensor:
        """Mean loss per token."""
        return (self.loss_sum / self.tokens).float()


class LanguageModel(MicrobatchModel, ComposerModel):
    """Composer model around :class:`train.step.microbatch.MicrobatchModel`, with the validation loss.

    ``pipelined`` takes a batch through the stages of a pipeline in training; None: no stages.
    """

    def __init__(self, decoder: Decoder, recipe: Recipe, precision: Precision) -> None:
        super().__init__(decoder, recipe, precision)
        self.pipelined: Callable[[Batch], dict[str, Tensor]] | None = None

    def forward(self, batch: Batch) -> Any:
        """Returns the losses of a microbatch, or in training those of a batch through a pipeline."""
        if self.pipelined is None or not self.training:
            return super().forward(batch)
        return self.pipelined(batch)

    def loss(self, outputs: Any, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the losses of a microbatch, or those of a batch whose backward passes are done."""
        if not isinstance(outputs, dict):
            return super().loss(outputs, batch, *args, **kwargs)
        # Composer runs another backward pass, of a number that nothing depends on, which it scales in place.
        return outputs | {"total": outputs["total"].clone().requires_grad_() * 1}

    def eval_forward(self, batch: Batch, outputs: Any = None) -> DecoderOutput:
        """Returns the losses for validation."""
        return outputs if outputs is not None else self.forward(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Returns the validation metrics; the training loss comes from :meth:`loss`."""
        return {} if is_train else {"token_loss": TokenLoss()}

    def update_metric(self, batch: Batch, outputs: DecoderOutput, metric: Metric) -> None:
        """Adds a validation batch to the metric."""
        metric.update(outputs)
