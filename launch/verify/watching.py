"""The parity gate's watchers of a training run: one records the reference, one compares a layout with it.

They see, of every step: losses and the experts' token counts; gradients before and after clipping; the
optimizer's settings and moments, parameter by parameter; the weights after the update.

In bf16, with moments in bf16, and with Lion, a layout computes its update from the reference's gradients:
its own are compared, then replaced, before clipping and again after it, and its weights are set to the
reference's after each step. So what one step rounds neither hides in the update's error nor sends tokens to
other experts in the next, and clipping, moments, decay and learning rate are held to what fp32 arithmetic
allows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from torch import Tensor, nn
from torch.optim import Optimizer

from launch.verify.bounds import FEWEST, FLOOR, LEAST_CHANGE, bounds_of
from launch.verify.cases import Case, has_tiles
from launch.verify.quantities import (
    Named,
    copies_of,
    decoder_of,
    gradients_of,
    kind_of,
    moments_of,
    rms,
    set_rows,
    settings_of,
    step_of,
    trained,
    weights_of,
    whole_of,
)
from train.model.decoder import Decoder
from train.model.init import own_part
from train.model.moe import by_sequence
from train.model.router import Router, Routing
from train.recipe import sizes
from train.recipe.schema import Moments, OptimizerKind, Precision
from train.recipe.topology import Topology
from train.record.metrics import GRADIENT_NORM
from train.step.microbatch import Batch
from train.step.step import TrainingStep


@dataclass
class Deviation:
    """Deviation of a quantity from the reference."""

    worst: float = 0.0
    at: str = ""
    first: str = ""
    """Step and name of the first value above the bound; empty if there is none."""

    def see(self, error: float, at: str, bound: float) -> None:
        """Adds one comparison."""
        if math.isnan(error):
            error = math.inf
        if error > self.worst:
            self.worst, self.at = error, at
        if error > bound and not self.first:
            self.first = at

    def merge(self, other: "Deviation") -> None:
        """Adds another rank's deviation."""
        if other.worst > self.worst:
            self.worst, self.at = other.worst, other.at
        self.first = self.first or other.first


@dataclass
class ReferenceRecord:
    """Record of the reference: per step, scalars and full tensors by parameter."""

    batches: list[Batch] = field(default_factory=list)
    """Global batches, if the loader read them."""
    figures: list[dict[str, float]] = field(default_factory=list)
    choices: list[Tensor | None] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: list[dict[str, Tensor]] = field(default_factory=list)
    """Gradients after clipping."""
    settings: list[dict[str, str]] = field(default_factory=list)
    """See :func:`launch.verify.quantities.settings_of`."""
    moments: list[dict[str, Tensor]] = field(default_factory=list)
    """See :func:`launch.verify.quantities.moments_of`."""
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Initial weights, then those after each step."""
    least_gap: float = math.inf


_BOUND_LIKE = {"mtp": "loss", "logit_z": "loss", "logit": "loss"}
"""Figures that few recipes have, and the quantity that they are shown and bounded with: the loss of
multi-token prediction, the z-loss of output logits, and with QK-clip attention's largest logit."""


class NewestMetrics(LoggerDestination):
    """Keeps the newest value of every key."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Takes values that the trainer logs."""
        self.latest |= {key: float(value) for key, value in metrics.items()}


class Watcher(Callback, ABC):
    """Observes every step: what went in, what was computed, and what the update did."""

    def __init__(self) -> None:
        self.figures = NewestMetrics()
        self.expert_tokens: Callable[[], Tensor | None] = lambda: None
        """Tokens of each expert in the last batch, over all ranks."""

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Sees what a step will read."""
        self.see_batch(step_of(state), state.batch)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Sees a step that is complete."""
        latest = self.figures.latest
        figures = {key: latest[f"loss/train/{name}"] for key, name in _LOSSES.items()}
        for name in ("mtp", "logit_z"):
            if (figure := latest.get(f"loss/train/{name}")) is not None:
                figures[name] = figure
        figures["norm"] = latest[GRADIENT_NORM]
        decoder = decoder_of(state)
        if isinstance(decoder, Decoder) and decoder.largest_logit is not None:
            figures["logit"] = decoder.largest_logit.item()
        step = step_of(state) - 1
        self.see_figures(step, figures, self.expert_tokens())
        self.see_optimizer(step, state.optimizers[0], trained(decoder_of(state)))
        self.see_weights(step, whole_of(weights_of(state)))

    @abstractmethod
    def see_batch(self, step: int, batch: Batch) -> None:
        """This rank's sequences."""

    @abstractmethod
    def see_figures(self, step: int, figures: dict[str, float], choices_LE: Tensor | None) -> None:
        """Losses, norm before clipping, and tokens of each expert over all ranks."""

    @abstractmethod
    def see_gradients(self, step: int, parameters: Named) -> None:
        """Gradients of the global batch."""

    @abstractmethod
    def see_clipped(self, step: int, parameters: Named) -> None:
        """The same after clipping, as the optimizer will read them."""

    @abstractmethod
    def see_optimizer(self, step: int, optimizer: Optimizer, parameters: Named) -> None:
        """The optimizer after the step."""

    @abstractmethod
    def see_weights(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Weights after the step."""


class WatchedStep(TrainingStep):
    """Shows gradients to the watcher before and after it clips them."""

    def __init__(self, watcher: Watcher, *args: Any) -> None:
        super().__init__(*args)
        self.watcher, self.steps = watcher, 0

    def clip(self) -> Tensor:
        """Clips, watched."""
        parameters = trained(self.model.decoder)
        self.watcher.see_gradients(self.steps, parameters)
        norm = super().clip()
        self.watcher.see_clipped(self.steps, parameters)
        self.steps += 1
        return norm


_LOSSES = {"loss": "language", "balance": "balance", "z": "z"}


class Writer(Watcher):
    """Writes the reference's record."""

    def __init__(self, record: ReferenceRecord) -> None:
        super().__init__()
        self.record = record

    def see_batch(self, step: int, batch: Batch) -> None:
        """Records them."""
        self.record.batches.append(copies_of(batch.items()))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Records the initial weights, and from then on how near experts are to being chosen."""
        self.see_weights(-1, whole_of(weights_of(state)))
        for module in state.model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._see_gap)

    def see_figures(self, step: int, figures: dict[str, float], choices_LE: Tensor | None) -> None:
        """Records them."""
        self.record.figures.append(figures)
        self.record.choices.append(None if choices_LE is None else choices_LE.clone())

    def see_gradients(self, step: int, parameters: Named) -> None:
        """Records them."""
        self.record.gradients.append(copies_of(whole_of(gradients_of(parameters))))

    def see_clipped(self, step: int, parameters: Named) -> None:
        """Records them."""
        self.record.clipped.append(copies_of(whole_of(gradients_of(parameters))))

    def see_optimizer(self, step: int, optimizer: Optimizer, parameters: Named) -> None:
        """Records settings and moments."""
        self.record.settings.append(settings_of(optimizer, parameters))
        self.record.moments.append(copies_of(whole_of(moments_of(optimizer, parameters))))

    def see_weights(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Records them."""
        self.record.weights.append(copies_of(weights))

    def _see_gap(self, router: nn.Module, _inputs: Any, routing: Routing) -> None:
        assert isinstance(router, Router)
        moe, scores_TE = router.moe, routing.scores_TE.detach()
        biased_TE = router.biased(scores_TE)
        gaps = [_least_gap(biased_TE, moe.top_k)]
        if moe.groups > 1:
            gaps.append(_least_gap(router.group_scores(biased_TE), moe.top_groups))
            gaps.append(_least_gap(router.within_groups(biased_TE), moe.top_k))
        if by_sequence(moe):
            gaps.append(_least_gap(scores_TE / scores_TE.sum(dim=-1, keepdim=True), moe.top_k))
        self.record.least_gap = min(self.record.least_gap, *gaps)


def _least_gap(scores: Tensor, kept: int) -> float:
    """The least difference, over all tokens, of the last score that is kept and the first that is not."""
    if scores.shape[-1] == kept:
        return math.inf
    ranked = scores.topk(kept + 1, dim=-1).values
    return (ranked[:, kept - 1] - ranked[:, kept]).min().item()


class Comparer(Watcher):
    """Compares a layout with the reference's record."""

    def __init__(self, record: ReferenceRecord, case: Case, topology: Topology) -> None:
        super().__init__()
        self.record, self.case, self.topology = record, case, topology
        optimizer = case.recipe.optimizer
        in_bf16 = case.precision is Precision.bf16 or optimizer.moments is Moments.bf16
        self.is_given = in_bf16 or optimizer.kind is OptimizerKind.lion or has_tiles(case.recipe)
        """Are updates computed from the reference's gradients and weights?"""
        self.bounds = bounds_of(case.precision, case.recipe)
        self.deviations = {quantity: Deviation() for quantity in self.bounds}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Compares which weights there are: of a pipeline, those of all stages together."""
        held = [name for name, _ in weights_of(state)]
        if self.case.layout.pipeline > 1:
            of_ranks: list[list[str]] = [[]] * self.topology.world_size
            dist.all_gather_object(of_ranks, held)
            held = [name for names in of_ranks for name in names]
        missing = self.record.weights[0].keys() - held
        self._see("weights", float(bool(missing)), -1, f"{sorted(missing)[:1]} is on no rank")

    def see_batch(self, step: int, batch: Batch) -> None:
        """Compares them, if the loader read them: this rank's share of the whole batch, in order."""
        if not self.case.input.loaded:
            return
        for key, whole in self.record.batches[step].items():
            layout = self.case.recipe.parallelism
            reader = sizes.reader_of(layout, self.topology.world_size, self.topology.rank)
            theirs = whole.chunk(self.case.layout.readers)[reader]
            is_same = key in batch and torch.equal(batch[key], theirs)
            self._see("read", float(not is_same), step, f"{key} of rank {self.topology.rank}")

    def see_figures(self, step: int, figures: dict[str, float], choices_LE: Tensor | None) -> None:
        """Compares them."""
        for quantity, expected in self.record.figures[step].items():
            error = abs(figures[quantity] - expected) / (abs(expected) or 1.0)
            self._see(_BOUND_LIKE.get(quantity, quantity), error, step, quantity)
        expected_LE = self.record.choices[step]
        if expected_LE is not None:
            assert choices_LE is not None
            for layer, (ours, theirs) in enumerate(zip(choices_LE, expected_LE, strict=True)):
                self._see("choices", float((ours - theirs).abs().max()), step, f"layer {layer}")

    def see_gradients(self, step: int, parameters: Named) -> None:
        """Compares each expert's and each other parameter's, and their errors' mean."""
        expected = self.record.gradients[step]
        floor = FLOOR * rms(expected)
        for label, ours, theirs in self._split(whole_of(gradients_of(parameters)), expected):
            least = floor * math.sqrt(theirs.numel())
            difference, wanted = (ours - theirs).double(), theirs.double()
            scale = max(float(wanted.norm()), least) or 1.0
            error = float(difference.norm()) / scale
            self._see("gradients", error, step, label)
            if self._is_exact(label):
                self._see("exact", error, step, label)
            bias = abs(float((difference * wanted).sum())) / scale**2
            self._see("bias", bias * min(1.0, math.sqrt(theirs.numel() / FEWEST)), step, label)
        if self.is_given:
            set_rows(gradients_of(parameters), expected)

    def see_clipped(self, step: int, parameters: Named) -> None:
        """Compares this rank's rows."""
        self._compare_rows("clipped", step, gradients_of(parameters), self.record.clipped[step])
        if self.is_given:
            set_rows(gradients_of(parameters), self.record.clipped[step])

    def see_optimizer(self, step: int, optimizer: Optimizer, parameters: Named) -> None:
        """Compares settings, which must be equal, and this rank's rows of the moments."""
        found, expected = settings_of(optimizer, parameters), self.record.settings[step]
        wanted_here = {name for name in expected if name.partition(": ")[0] in parameters}
        for name in sorted(wanted_here.union(found)):
            ours, theirs = found.get(name, "absent"), expected.get(name, "absent")
            self._see("settings", float(ours != theirs), step, f"{name} is {ours}, not {theirs}")
        moments, wanted = list(moments_of(optimizer, parameters)), self.record.moments[step]
        for kind in sorted({kind_of(name) for name in wanted}):
            own = [(name, moment) for name, moment in moments if kind_of(name) == kind]
            self._compare_rows("moments", step, own, {n: m for n, m in wanted.items() if kind_of(n) == kind})

    def see_weights(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Compares each expert's and each other parameter's."""
        before, after = self.record.weights[step : step + 2]
        for label, ours, theirs, old in self._split(weights, after, before):
            scale = float(torch.linalg.vector_norm(theirs))
            if self.is_given:
                scale = max(float(torch.linalg.vector_norm(theirs - old)), LEAST_CHANGE * scale)
            self._see("weights", float(torch.linalg.vector_norm(ours - theirs)) / (scale or 1.0), step, label)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Sees the step, then lets the next begin with the reference's weights."""
        super().batch_end(state, logger)
        if self.is_given:
            set_rows(weights_of(state), self.record.weights[step_of(state)])

    def _compare_rows(
        self,
        quantity: str,
        step: int,
        found: Iterable[tuple[str, Tensor]],
        expected: dict[str, Tensor],
    ) -> None:
        """Compares this rank's rows, without a collective, with those of the reference's tensors."""
        floor = rms(expected)
        for name, tensor in found:
            # Second moments are squares of gradients, whose floor this is.
            least = floor * (FLOOR**2 if name.endswith("_sq") else FLOOR)
            ours, row, column = own_part(tensor.detach())
            if not ours.numel():
                continue
            whole = expected[name]
            theirs = whole[row : row + len(ours)][..., column : column + ours.shape[-1]]
            # Not against a few elements that happen to be near zero: rows are measured against their tensor.
            least = max(least, float(whole.norm()) / math.sqrt(whole.numel()))
            scale = max(float(theirs.norm()), least * math.sqrt(theirs.numel())) or 1.0
            self._see(quantity, float((ours - theirs).norm()) / scale, step, name)

    def _split(
        self, found: Iterable[tuple[str, Tensor]], *expected: dict[str, Tensor]
    ) -> Iterator[tuple[Any, ...]]:
        """Yields, for each parameter or each of its experts, the label, our tensor and the expected ones."""
        rows = sizes.expert_width(self.case.recipe.model)
        for name, tensor in found:
            tensors = [tensor, *(each[name] for each in expected)]
            if ".experts." not in name:
                yield name, *tensors
                continue
            for expert, parts in enumerate(zip(*(each.split(rows) for each in tensors), strict=True)):
                yield f"{name} of expert {expert}", *parts

    def _is_exact(self, label: str) -> bool:
        """Returns whether a gradient is rounded where the reference rounds it."""
        layout, is_expert = self.case.layout, ".experts." in label
        if (
            layout.pipeline > 1
            and label.startswith("transformer.wte.")
            and sizes.embeds_twice(self.case.recipe.model)
        ):
            return False  # either stage rounds its own part
        if is_expert and (layout.expert > 1 or (layout.sharing > 1 and has_tiles(self.case.recipe))):
            return False
        if self.case.precision is not Precision.bf16 or layout.sharing == 1:
            return True
        is_split = sizes.is_split_by_rows(label) or sizes.is_split_by_columns(label)
        return layout.tensor > 1 and is_split and not is_expert

    def _see(self, quantity: str, error: float, step: int, at: str) -> None:
        self.deviations[quantity].see(error, f"step {step + 1}: {at}", self.bounds[quantity])
