"""The stages of a run: what its phases come to in whole batches, and what a later edit makes of them.

A stage is a run of batches of one composition. The stages of a new run follow from its recipe. Those of a
run that goes on are the ones that it was trained on so far, from its checkpoint, and behind them what the
recipe says now: the past is never computed anew, so that neither rounding nor an edit can change it.
Nothing here needs NumPy or torch.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from train.recipe.errors import UserError
from train.recipe.phases import batch_sequences, phase_tokens, phases_of
from train.recipe.schema import Interpolation, Recipe

RAMP_PIECES = 256
"""Pieces of constant weights that a ramp is made of, each with the ramp's mean over it."""


@dataclass(frozen=True)
class MixtureSegment:
    """Positions of constant weights, from ``first`` up to the next segment's, the last one's without end."""

    first: int
    """Position, in samples, at which it begins."""
    weights: Mapping[str, float]
    """Share of the samples per domain, not negative; they are normalised."""
    step: int = 1
    """Samples of a sequence: as many in a row are of one domain."""
    stage: int = 0
    """Number of its stage."""


@dataclass(frozen=True)
class Stage:
    """Batches of one composition. Samples are sequences of the shards' length, data.sequence_tokens."""

    phase: int
    """Number of its phase in the recipe, from 0."""
    first_batch: int
    first_sample: int
    end_sample: int
    """Sample after its last; whole batches."""
    sequence_samples: int
    """Samples of a sequence, above 1 where sequences are longer than the shards'."""
    batch_sequences: int
    """Sequences of a global batch."""
    weights: dict[str, float]
    end_weights: dict[str, float]
    """Empty: weights are constant."""
    interpolation: str
    ramp_start: int
    """Sample at which the weights are ``weights`` ..."""
    ramp_end: int
    """... and at which they are ``end_weights``, although the stage may end before."""
    learning_rate_scale: float
    rope_theta: float

    @property
    def batch_samples(self) -> int:
        """Samples of a global batch."""
        return self.batch_sequences * self.sequence_samples

    @property
    def batches(self) -> int:
        """Optimizer steps."""
        return (self.end_sample - self.first_sample) // self.batch_samples

    @property
    def end_batch(self) -> int:
        """Batch after its last."""
        return self.first_batch + self.batches


@dataclass(frozen=True)
class Edit:
    """What a change of the recipe replaced when a run went on."""

    batch: int
    """The first batch under the new stages."""
    sample: int
    replaced: tuple[Stage, ...]
    """The stages that were planned from there on before."""


@dataclass(frozen=True)
class Skip:
    """Positions that are left out: every batch that holds one of them is passed over, not trained."""

    first_sample: int
    end_sample: int
    """Position after the last."""
    reason: str


@dataclass(frozen=True)
class Curriculum:
    """All stages of a run, in order and without gaps."""

    stages: tuple[Stage, ...]
    sample_tokens: int
    """Tokens of a sample."""
    edits: tuple[Edit, ...] = ()
    """Every edit so far, in order; never shortened."""
    skips: tuple[Skip, ...] = ()
    """What is left out by declaration; numbers of batches, positions and the learning rate go on over it."""

    @property
    def batches(self) -> int:
        """Number of the run's last step: what is left out counts, unless nothing is trained behind it."""
        end = self.stages[-1].end_batch
        return next((first for first, after in self.skipped if first < end <= after), end)

    @cached_property
    def skipped(self) -> tuple[tuple[int, int], ...]:
        """The batches that are left out, as ascending ranges (first, after the last) that do not touch."""
        found: list[tuple[int, int]] = []
        for skip in sorted(self.skips, key=lambda skip: skip.first_sample):
            first, after = self._batch_of(skip.first_sample), self._batch_of(skip.end_sample - 1) + 1
            if found and first <= found[-1][1]:
                found[-1] = found[-1][0], max(after, found[-1][1])
            else:
                found.append((first, after))
        return tuple(found)

    def skipped_before(self, batch: int) -> list[tuple[int, int]]:
        """The ranges of :attr:`skipped` as far as they lie before a batch."""
        return [(first, min(after, batch)) for first, after in self.skipped if first < batch]

    def trained_from(self, batch: int) -> int:
        """The first batch, from this one on, that is not left out."""
        return next((after for first, after in self.skipped if first <= batch < after), batch)

    def trained_before(self, batch: int) -> Iterator[int]:
        """The batches before one that are not left out."""
        at = 0
        for first, after in [*self.skipped_before(batch), (batch, batch)]:
            yield from range(at, first)
            at = after

    def samples_before(self, batch: int) -> int:
        """The position at which a batch begins."""
        return 0 if batch == 0 else self.tokens_after(batch - 1) // self.sample_tokens

    @property
    def samples(self) -> int:
        """Samples of the run."""
        return self.stages[-1].end_sample

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.samples * self.sample_tokens

    def stage_of(self, batch: int) -> Stage:
        """The stage of a batch; the last one goes on beyond its end."""
        return next((stage for stage in self.stages if batch < stage.end_batch), self.stages[-1])

    def tokens_after(self, batch: int) -> int:
        """Tokens up to the end of a batch."""
        stage, batch = self.stage_of(batch), batch + 1
        return (stage.first_sample + (batch - stage.first_batch) * stage.batch_samples) * self.sample_tokens

    def batch_at(self, sample: int) -> int:
        """The batch that begins at a sample."""
        batch = self._batch_of(sample)
        assert self.samples_before(batch) == sample, (sample, batch)
        return batch

    def _batch_of(self, sample: int) -> int:
        """The batch that holds a sample."""
        stage = next((stage for stage in self.stages if sample < stage.end_sample), self.stages[-1])
        return stage.first_batch + (sample - stage.first_sample) // stage.batch_samples

    def segments(self) -> list[MixtureSegment]:
        """The weights of all stages, ramps cut into pieces."""
        return [piece for number, stage in enumerate(self.stages) for piece in _pieces(stage, number)]


def plan_stages(recipe: Recipe) -> Curriculum:
    """The stages of a new run.

    Raises:
        UserError: for a phase that is over before its first batch.
    """
    skips = tuple(Skip(skip.first_position, skip.end_position, skip.reason) for skip in recipe.data.skips)
    return Curriculum(tuple(_append(recipe, [], phases_from=0)), recipe.data.sequence_tokens, skips=skips)


def continue_stages(past: Curriculum, recipe: Recipe, sample: int) -> Curriculum:
    """The stages of a run that goes on at ``sample``, a batch's beginning, with what the recipe says now.

    Later phases may be changed, added and taken away. The phase in progress may change its end and its
    batch; another mixture is another phase behind it.

    Raises:
        UserError: if the recipe would rewrite what was read before ``sample``.
    """
    done = [stage for stage in past.stages if stage.first_sample < sample]
    if not done:
        return plan_stages(recipe)
    last = done.pop()
    for stage, following in itertools.pairwise([*done, last]):
        _require_same(stage, recipe, is_over=True, sample=stage.end_sample)
        if following.phase != stage.phase and _end_sample(recipe, stage.phase) > stage.end_sample:
            raise UserError(
                f"has another end than token {stage.end_sample * past.sample_tokens:,}, where it was over",
                key=f"data.phases[{stage.phase}]",
                remedy="leave the phase as it was; a change belongs into later phases",
            )
    _require_same(last, recipe, is_over=sample >= last.end_sample, sample=sample)
    phase = phases_of(recipe)[last.phase]
    left = _end_sample(recipe, last.phase) - sample
    if left <= 0:
        done.append(replace(last, end_sample=sample))
    elif batch_sequences(recipe, phase) == last.batch_sequences:
        done.append(replace(last, end_sample=sample + _whole_batches(left, last.batch_samples)))
    else:
        done.append(replace(last, end_sample=sample))
        batch = batch_sequences(recipe, phase)
        size = batch * last.sequence_samples
        end = sample + _whole_batches(left, size)
        first = done[-1].end_batch
        done.append(
            replace(last, first_batch=first, first_sample=sample, end_sample=end, batch_sequences=batch)
        )
    stages = tuple(_append(recipe, done, phases_from=last.phase + 1))
    if stages == past.stages:
        return past
    replaced = tuple(stage for stage in past.stages if stage.end_sample > sample)
    edit = Edit(past.batch_at(sample), sample, replaced)
    return Curriculum(stages, past.sample_tokens, (*past.edits, edit), past.skips)


def to_json(curriculum: Curriculum) -> dict[str, Any]:
    """Plain values that :func:`from_json` reads back."""
    return asdict(curriculum)


def from_json(tree: Mapping[str, Any]) -> Curriculum:
    """The stages that :func:`to_json` wrote."""
    edits = tuple(
        Edit(edit["batch"], edit["sample"], tuple(Stage(**stage) for stage in edit["replaced"]))
        for edit in tree["edits"]
    )
    skips = tuple(Skip(**skip) for skip in tree.get("skips", []))
    return Curriculum(tuple(Stage(**stage) for stage in tree["stages"]), tree["sample_tokens"], edits, skips)


def _append(recipe: Recipe, stages: list[Stage], *, phases_from: int) -> list[Stage]:
    """The stages and behind them one for each phase from a number on."""
    stages = list(stages)
    for number, phase in enumerate(phases_of(recipe)):
        if number < phases_from:
            continue
        assert phase.sequence_tokens is not None and phase.rope_theta is not None
        first = stages[-1].end_sample if stages else 0
        left = _end_sample(recipe, number) - first
        if left <= 0:
            raise UserError(
                f"is over at token {_end_sample(recipe, number) * recipe.data.sequence_tokens:,}, which the "
                "batches of the phase before have passed",
                key=f"data.phases[{number}].tokens",
                remedy="lengthen it by a batch at least, or leave it out",
            )
        step, batch = phase.sequence_tokens // recipe.data.sequence_tokens, batch_sequences(recipe, phase)
        stages.append(
            Stage(
                phase=number,
                first_batch=stages[-1].end_batch if stages else 0,
                first_sample=first,
                end_sample=first + _whole_batches(left, batch * step),
                sequence_samples=step,
                batch_sequences=batch,
                weights=dict(phase.weights),
                end_weights=dict(phase.end_weights),
                interpolation=phase.interpolation.value,
                ramp_start=first,
                ramp_end=first + _whole_batches(-(-phase.tokens // recipe.data.sequence_tokens), step),
                learning_rate_scale=phase.learning_rate_scale,
                rope_theta=phase.rope_theta,
            )
        )
    return stages


def _end_sample(recipe: Recipe, number: int) -> int:
    """The sample at which a phase's tokens, and those of all before it, are reached."""
    tokens = sum(phase_tokens(phase) for phase in phases_of(recipe)[: number + 1])
    return -(-tokens // recipe.data.sequence_tokens)


def _whole_batches(samples: int, batch_samples: int) -> int:
    return -(-samples // batch_samples) * batch_samples


def _require_same(stage: Stage, recipe: Recipe, *, is_over: bool, sample: int) -> None:
    """Raises where the recipe's phase is not the one that a stage was trained in, up to ``sample``."""
    key = f"data.phases[{stage.phase}]"
    tokens = sample * recipe.data.sequence_tokens
    phases = phases_of(recipe)
    remedy = "leave the phase as it was; a change belongs into later phases"
    if not is_over:
        remedy = (
            f"leave the phase as it was but for stop_after_tokens, so that it ends at token {tokens:,}, "
            "and let another phase follow it"
        )
    if len(phases) <= stage.phase:
        raise UserError(f"is gone, but was read up to token {tokens:,}", key=key, remedy=remedy)
    phase = phases[stage.phase]
    assert phase.sequence_tokens is not None
    was_and_is: dict[str, tuple[object, object]] = {
        "weights": (stage.weights, phase.weights),
        "end_weights": (stage.end_weights, phase.end_weights),
        "sequence_tokens": (stage.sequence_samples * recipe.data.sequence_tokens, phase.sequence_tokens),
        "learning_rate_scale": (stage.learning_rate_scale, phase.learning_rate_scale),
        "rope_theta": (stage.rope_theta, phase.rope_theta),
    }
    if stage.end_weights:
        length = _whole_batches(-(-phase.tokens // recipe.data.sequence_tokens), stage.sequence_samples)
        was_and_is |= {
            "interpolation": (stage.interpolation, phase.interpolation.value),
            "tokens": (
                (stage.ramp_end - stage.ramp_start) * recipe.data.sequence_tokens,
                length * recipe.data.sequence_tokens,
            ),
        }
    for name, (was, now) in was_and_is.items():
        if was != now:
            raise UserError(
                f"is {now}, but tokens up to {tokens:,} were read with {was}",
                key=f"{key}.{name}",
                remedy=remedy,
            )
    if _end_sample(recipe, stage.phase) <= sample - stage.batch_samples:
        raise UserError(f"ends before token {tokens:,}, which was read in it", key=key, remedy=remedy)


def _pieces(stage: Stage, number: int) -> Iterator[MixtureSegment]:
    """A stage's weights as segments."""
    step = stage.sequence_samples
    if not stage.end_weights:
        yield MixtureSegment(stage.first_sample, stage.weights, step, number)
        return
    length = stage.ramp_end - stage.ramp_start
    cuts = {stage.ramp_start + step * (n * length // (RAMP_PIECES * step)) for n in range(1, RAMP_PIECES)}
    inner = sorted(cut for cut in cuts if stage.first_sample < cut < stage.end_sample)
    bounds = [stage.first_sample, *inner, min(stage.end_sample, stage.ramp_end)]
    names = sorted({*stage.weights, *stage.end_weights})
    for begin, end in itertools.pairwise(bounds):
        part = _mean_progress(
            stage.interpolation, (begin - stage.ramp_start) / length, (end - stage.ramp_start) / length
        )
        weights = {
            name: round(
                (1 - part) * stage.weights.get(name, 0.0) + part * stage.end_weights.get(name, 0.0), 9
            )
            for name in names
        }
        yield MixtureSegment(begin, weights, step, number)


def _mean_progress(interpolation: str, begin: float, end: float) -> float:
    """Mean of the way from the first weights to the last over a part of the ramp, all in 0..1."""

    def integral(at: float) -> float:
        if interpolation == Interpolation.linear.value:
            return at * at / 2
        return at / 2 - math.sin(math.pi * at) / (2 * math.pi)

    return (integral(end) - integral(begin)) / (end - begin)
