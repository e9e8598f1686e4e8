"""Runs one case of the parity gate through the real trainer and compares it with the reference.

The reference is one unsharded process that records its values in a file. Every rank of a layout compares
its own values with that file, parameter by parameter and expert by expert, so that drift between replicas
is found too.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from launch.verify.bounds import FLOOR, LEAST_CHANGE, LEAST_GAP, bounds_of
from launch.verify.cases import Case, idle_experts, make_batches, own_rows, steer_router
from launch.verify.forked_ranks import run_ranks
from launch.verify.reference import CountTogether, build_rounding_reference, reference_recipe
from train.checkpoint.files import Progress
from train.layout.optim import load_lion
from train.model.router import Router, Routing
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Precision
from train.recipe.topology import Topology
from train.record.metrics import GRADIENT_NORM
from train.run import Machine, build_model
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch
from train.step.step import TrainingStep
from train.trainer import build_trainer

SEEDS = 50

Fault = Callable[[], contextlib.AbstractContextManager[Any]]
"""Context in which a rank's process trains incorrectly; for testing the gate itself."""


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
class CaseOutcome:
    """A case with its deviations by quantity."""

    case: Case
    deviations: dict[str, Deviation] = field(default_factory=dict)
    error: str = ""
    """Reason why the case did not complete, if it did not."""
    seconds: float = 0.0

    @property
    def has_passed(self) -> bool:
        """True if every quantity is within its bound."""
        return not self.error and not any(d.first for d in self.deviations.values())


@dataclass
class ReferenceRecord:
    """Record of the reference: per step, scalars and full tensors by parameter."""

    figures: list[dict[str, float]] = field(default_factory=list)
    choices: list[Tensor | None] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Initial weights, then those after each step."""
    least_gap: float = math.inf


def import_optimizers() -> None:
    """Imports the module that Lion imports lazily, so that forked ranks do not have to."""
    load_lion()


def make_reference(case: Case, file: Path) -> int:
    """Runs the case on one process and writes its record; returns the seed of the data.

    Skips data in which rounding could change some token's choice of experts.

    Raises:
        RankError: if the reference fails, or an input does not have its intended effect.
    """

    def work(_: Topology) -> int:
        for seed in range(SEEDS):
            record = ReferenceRecord()
            _train(case, Topology(), seed, _Writer(record))
            if record.least_gap > LEAST_GAP:
                _check_input(case, record)
                torch.save(record.__dict__, file)
                return seed
        raise AssertionError(f"in each of {SEEDS} seeds, some token's choice of experts is within rounding")

    return run_ranks(1, work, output=Path(os.devnull))[0]


def run_case(
    case: Case, seed: int, file: Path, fault: Fault = contextlib.nullcontext
) -> dict[str, Deviation]:
    """Runs the case under its layout and returns the deviations over all ranks."""

    def work(topology: Topology) -> dict[str, Deviation]:
        record = ReferenceRecord(**torch.load(file, mmap=True, weights_only=True))
        comparer = _Comparer(record, case)
        with fault():
            _train(case, topology, seed, comparer)
        return comparer.deviations

    merged: dict[str, Deviation] = {}
    for deviations in run_ranks(case.layout.world_size, work, output=Path(os.devnull)):
        for quantity, deviation in deviations.items():
            merged.setdefault(quantity, Deviation()).merge(deviation)
    return merged


def _train(case: Case, topology: Topology, seed: int, watcher: "_Watcher") -> None:
    """Runs a few steps of the real trainer on this rank's share of the case's batches."""
    recipe, rows = case.recipe, list(range(case.recipe.training.global_batch_sequences))
    if isinstance(watcher, _Writer):
        recipe, rows = reference_recipe(case), list(case.rows)
    if isinstance(watcher, _Writer) and case.precision is Precision.bf16:
        model, optimizer = build_rounding_reference(recipe)
    else:
        model, optimizer = build_model(recipe, Machine(topology, "cpu", case.precision))
    steer_router(model.decoder, recipe, case.input)
    share = len(rows) // topology.world_size
    mine = rows[topology.rank * share : (topology.rank + 1) * share]
    batches = [
        {key: value[mine] for key, value in batch.items()} for batch in make_batches(recipe, case.input, seed)
    ]
    curriculum = plan_stages(recipe)
    step = _WatchedStep(watcher, recipe, model, topology, curriculum)
    watcher.expert_tokens = step.expert_tokens
    is_split = isinstance(watcher, _Writer) and case.balance_microbatches > 1
    together = [CountTogether(model, case.balance_microbatches)] if is_split else []
    trainer = build_trainer(
        recipe,
        model,
        optimizer,
        DataLoader(_Batches(batches), batch_size=None),
        {},
        [watcher, step, *together],
        [watcher.figures],
        Progress(0, 0, 0, 0.0),
        curriculum,
    )
    trainer.fit()
    trainer.close()


class _Batches(IterableDataset[Batch]):
    """This rank's batches, unchanged; Composer refuses a sized dataset that is the same on all ranks."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class _Figures(LoggerDestination):
    """Keeps the newest value of every key."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.latest |= {key: float(value) for key, value in metrics.items()}


class _Watcher(Callback, ABC):
    """Observes every step's scalars, gradients before clipping, and weights after the update."""

    def __init__(self) -> None:
        self.figures = _Figures()
        self.expert_tokens: Callable[[], Tensor | None] = lambda: None
        """Tokens of each expert in the last batch, over all ranks."""

    def batch_end(self, state: State, logger: Logger) -> None:
        latest = self.figures.latest
        figures = {key: latest[f"loss/train/{name}"] for key, name in _LOSSES.items()}
        figures["norm"] = latest[GRADIENT_NORM]
        step = _step(state) - 1
        self.see_figures(step, figures, self.expert_tokens())
        self.see_weights(step, _whole(_weights(state)))

    @abstractmethod
    def see_figures(self, step: int, figures: dict[str, float], choices_LE: Tensor | None) -> None:
        """Losses, norm before clipping, and tokens of each expert over all ranks."""

    @abstractmethod
    def see_gradients(self, step: int, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Gradients of the global batch."""

    @abstractmethod
    def see_weights(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Weights after the step."""


class _WatchedStep(TrainingStep):
    """Shows gradients to the watcher before it clips them."""

    def __init__(self, watcher: _Watcher, *args: Any) -> None:
        super().__init__(*args)
        self.watcher, self.steps = watcher, 0

    def clip(self) -> Tensor:
        named = self.model.decoder.named_parameters()
        self.watcher.see_gradients(self.steps, _whole((name, p.grad) for name, p in named))
        self.steps += 1
        return super().clip()


_LOSSES = {"loss": "language", "balance": "balance", "z": "z"}


class _Writer(_Watcher):
    """Writes the reference's record."""

    def __init__(self, record: ReferenceRecord) -> None:
        super().__init__()
        self.record = record

    def fit_start(self, state: State, logger: Logger) -> None:
        self.see_weights(-1, _whole(_weights(state)))
        for module in state.model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._see_gap)

    def see_figures(self, step: int, figures: dict[str, float], choices_LE: Tensor | None) -> None:
        self.record.figures.append(figures)
        self.record.choices.append(None if choices_LE is None else choices_LE.clone())

    def see_gradients(self, step: int, gradients: Iterable[tuple[str, Tensor]]) -> None:
        self.record.gradients.append({name: gradient.clone() for name, gradient in gradients})

    def see_weights(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.record.weights.append({name: weight.clone() for name, weight in weights})

    def _see_gap(self, router: nn.Module, _inputs: Any, routing: Routing) -> None:
        assert isinstance(router, Router)
        K = router.moe.top_k
        if router.moe.experts == K:
            return
        scores_TE = routing.scores_TE.detach()
        if router.expert_bias is not None:
            scores_TE = scores_TE + router.expert_bias
        ranked = scores_TE.topk(K + 1, dim=-1).values
        self.record.least_gap = min(self.record.least_gap, (ranked[:, K - 1] - ranked[:, K]).min().item())


class _Comparer(_Watcher):
    """Compares a layout with the reference's record."""

    def __init__(self, record: ReferenceRecord, case: Case) -> None:
        super().__init__()
        self.record, self.case = record, case
        self.bounds = bounds_of(case.precision, case.recipe.parallelism)
        self.deviations = {quantity: Deviation() for quantity in self.bounds}

    def see_figures(self, step: int, figures: dict[str, float], choices_LE: Tensor | None) -> None:
        for quantity, expected in self.record.figures[step].items():
            error = abs(figures[quantity] - expected) / (abs(expected) or 1.0)
            self._see(quantity, error, step, quantity)
        expected_LE = self.record.choices[step]
        if expected_LE is not None:
            assert choices_LE is not None
            for layer, (ours, theirs) in enumerate(zip(choices_LE, expected_LE, strict=True)):
                self._see("choices", float((ours - theirs).abs().max()), step, f"layer {layer}")

    def see_gradients(self, step: int, gradients: Iterable[tuple[str, Tensor]]) -> None:
        expected = self.record.gradients[step]
        elements = sum(gradient.numel() for gradient in expected.values())
        square = sum(float(gradient.double().square().sum()) for gradient in expected.values())
        floor_rms = FLOOR * math.sqrt(square / elements)
        for label, ours, theirs in self._split(gradients, expected):
            least = floor_rms * math.sqrt(theirs.numel())
            scale = max(float(torch.linalg.vector_norm(theirs)), least) or 1.0
            self._see("gradients", float(torch.linalg.vector_norm(ours - theirs)) / scale, step, label)

    def see_weights(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        before, after = self.record.weights[step : step + 2]
        for label, ours, theirs, old in self._split(weights, after, before):
            scale = float(torch.linalg.vector_norm(theirs))
            if self.case.precision is Precision.bf16:
                scale = max(float(torch.linalg.vector_norm(theirs - old)), LEAST_CHANGE * scale)
            self._see("weights", float(torch.linalg.vector_norm(ours - theirs)) / (scale or 1.0), step, label)

    def batch_end(self, state: State, logger: Logger) -> None:
        super().batch_end(state, logger)
        if self.case.precision is Precision.bf16:
            _set_weights(_weights(state), self.record.weights[_step(state)])

    def _split(
        self, found: Iterable[tuple[str, Tensor]], *expected: dict[str, Tensor]
    ) -> Iterator[tuple[Any, ...]]:
        """Yields, for each parameter or each of its experts, the label, our tensor and the expected ones."""
        rows = self.case.recipe.model.ffn_hidden_size
        for name, tensor in found:
            tensors = [tensor, *(each[name] for each in expected)]
            if ".experts." not in name:
                yield name, *tensors
                continue
            for expert, parts in enumerate(zip(*(each.split(rows) for each in tensors), strict=True)):
                yield f"{name} of expert {expert}", *parts

    def _see(self, quantity: str, error: float, step: int, at: str) -> None:
        self.deviations[quantity].see(error, f"step {step + 1}: {at}", self.bounds[quantity])


def _check_input(case: Case, record: ReferenceRecord) -> None:
    """Checks that the input had its intended effect in the reference, and that every gradient was clipped."""
    clip = case.recipe.training.clip_norm
    assert clip is not None and all(figures["norm"] > clip for figures in record.figures), "nothing clipped"
    for choices_LE in record.choices:
        if choices_LE is None:
            continue
        if case.input.idle:
            idle = idle_experts(case.recipe)
            assert not choices_LE[:, len(choices_LE[0]) - idle :].any(), (
                "experts that should be idle got tokens"
            )
        if case.input.crowded:
            assert (choices_LE.max(dim=1).values == choices_LE.sum(dim=1)).all(), "no expert got every token"


def _parameters(state: State) -> list[tuple[str, nn.Parameter]]:
    assert isinstance(state.model, LanguageModel)
    return list(state.model.decoder.named_parameters())


def _weights(state: State) -> list[tuple[str, Tensor]]:
    """Parameters, and the routers' expert bias, which is a buffer."""
    assert isinstance(state.model, LanguageModel)
    buffers = state.model.decoder.named_buffers()
    return [*_parameters(state), *((name, buffer) for name, buffer in buffers if "expert_bias" in name)]


@torch.no_grad()
def _set_weights(parameters: list[tuple[str, Tensor]], whole: dict[str, Tensor]) -> None:
    """Copies this rank's rows of the full weights into its parameters."""
    for name, parameter in parameters:
        local, first_row = own_rows(parameter)
        local.copy_(whole[name][first_row : first_row + len(local)])


def _whole(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor, all-gathered from its shards, one at a time."""
    for name, tensor in tensors:
        assert tensor is not None, f"{name} has no gradient"
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _step(state: State) -> int:
    return state.timestamp.batch.value
