"""The stages of a run: its phases in whole batches, as changed by later edits.

A stage is a series of batches of the same composition. The stages of a new run follow from its recipe. A
resumed run takes its past stages from its checkpoint and the following ones from the current recipe: the past
is never recomputed, so neither rounding nor an edit can change it. Nothing here needs NumPy or torch.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from train.recipe.errors import UserError
from train.recipe.phases import batch_sequences, fill_in_middle_shares, phase_tokens, phases_of
from train.recipe.schema import Interpolation, Phase, Recipe

RAMP_PIECES = 256
"""Segments of constant weights that approximate a ramp; each has the ramp's mean over the segment."""


@dataclass(frozen=True)
class MixtureSegment:
    """A range of positions with constant weights, up to the next segment; the last one is unbounded."""

    first: int
    """First position, in samples."""
    weights: Mapping[str, float]
    """Share of the samples per domain, not negative; they are normalised."""
    step: int = 1
    """Samples per sequence: so many consecutive samples come from one domain."""
    stage: int = 0
    """Number of its stage."""


@dataclass(frozen=True)
class Stage:
    """Batches of the same composition. A sample is a sequence of the shards' length, data.sequence_tokens."""

    phase: int
    """Number of its phase in the recipe, from 0."""
    first_batch: int
    first_sample: int
    end_sample: int
    """Sample after the last; the stage has whole batches."""
    sequence_samples: int
    """Samples per sequence, above 1 if sequences are longer than the shards'."""
    batch_sequences: int
    """Sequences per global batch."""
    weights: dict[str, float]
    end_weights: dict[str, float]
    """Empty: weights are constant."""
    interpolation: str
    ramp_start: int
    """Sample at which the ramp starts from ``weights``."""
    ramp_end: int
    """Sample at which the ramp reaches ``end_weights``; the stage may end earlier."""
    learning_rate_scale: float
    rope_theta: float
    fill_in_middle: dict[str, float] = field(default_factory=dict)
    """Share of the documents that are rearranged, by domain, see :mod:`data.fill_in_middle`."""
    spm: float = 0.0
    """Share of these in the order suffix, prefix, middle."""

    @property
    def batch_samples(self) -> int:
        """Samples per global batch."""
        return self.batch_sequences * self.sequence_samples

    @property
    def batches(self) -> int:
        """Optimizer steps."""
        return (self.end_sample - self.first_sample) // self.batch_samples

    @property
    def end_batch(self) -> int:
        """Batch after the last."""
        return self.first_batch + self.batches


@dataclass(frozen=True)
class Edit:
    """A change of the recipe on resume, with the stages that it replaced."""

    batch: int
    """The first batch under the new stages."""
    sample: int
    replaced: tuple[Stage, ...]
    """The stages that had been planned from there on."""


@dataclass(frozen=True)
class Skip:
    """An excluded range of positions: every batch that contains one of them is skipped."""

    first_sample: int
    end_sample: int
    """Position after the last excluded one."""
    reason: str


@dataclass(frozen=True)
class Curriculum:
    """All stages of a run, in order and without gaps."""

    stages: tuple[Stage, ...]
    sample_tokens: int
    """Tokens per sample."""
    edits: tuple[Edit, ...] = ()
    """Every edit so far, in order; never shortened."""
    skips: tuple[Skip, ...] = ()
    """Excluded ranges; batch numbers, positions and the learning rate count on over them."""

    @property
    def batches(self) -> int:
        """Number of the run's last trained step; skipped batches count unless they are the last ones."""
        end = self.stages[-1].end_batch
        return next((first for first, after in self.skipped if first < end <= after), end)

    @cached_property
    def skipped(self) -> tuple[tuple[int, int], ...]:
        """The skipped batches, as ascending ranges (first, after the last) that do not touch."""
        found: list[tuple[int, int]] = []
        for skip in sorted(self.skips, key=lambda skip: skip.first_sample):
            first, after = self._batch_of(skip.first_sample), self._batch_of(skip.end_sample - 1) + 1
            if found and first <= found[-1][1]:
                found[-1] = found[-1][0], max(after, found[-1][1])
            else:
                found.append((first, after))
        return tuple(found)

    def skipped_before(self, batch: int) -> list[tuple[int, int]]:
        """Returns the parts of :attr:`skipped` before a batch."""
        return [(first, min(after, batch)) for first, after in self.skipped if first < batch]

    def trained_from(self, batch: int) -> int:
        """Returns the first batch from this one on that is not skipped."""
        return next((after for first, after in self.skipped if first <= batch < after), batch)

    def trained_before(self, batch: int) -> Iterator[int]:
        """Yields the batches before this one that are not skipped."""
        at = 0
        for first, after in [*self.skipped_before(batch), (batch, batch)]:
            yield from range(at, first)
            at = after

    def samples_before(self, batch: int) -> int:
        """Returns the position at which a batch begins."""
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
        """Returns the stage of a batch; batches after the end belong to the last stage."""
        return next((stage for stage in self.stages if batch < stage.end_batch), self.stages[-1])

    def tokens_after(self, batch: int) -> int:
        """Returns the tokens up to the end of a batch."""
        stage, batch = self.stage_of(batch), batch + 1
        return (stage.first_sample + (batch - stage.first_batch) * stage.batch_samples) * self.sample_tokens

    def batch_at(self, sample: int) -> int:
        """Returns the batch that begins at a sample."""
        batch = self._batch_of(sample)
        assert self.samples_before(batch) == sample, (sample, batch)
        return batch

    def _batch_of(self, sample: int) -> int:
        """Returns the batch that contains a sample."""
        stage = next((stage for stage in self.stages if sample < stage.end_sample), self.stages[-1])
        return stage.first_batch + (sample - stage.first_sample) // stage.batch_samples

    def segments(self) -> list[MixtureSegment]:
        """Returns the mixture segments of all stages, with ramps cut into segments of constant weights."""
        return [
            segment for number, stage in enumerate(self.stages) for segment in _stage_segments(stage, number)
        ]


def plan_stages(recipe: Recipe) -> Curriculum:
    """Plans the stages of a new run.

    Raises:
        UserError: for a phase that ends before its first batch.
    """
    skips = tuple(Skip(skip.first_position, skip.end_position, skip.reason) for skip in recipe.data.skips)
    return Curriculum(tuple(_append(recipe, [], phases_from=0)), recipe.data.sequence_tokens, skips=skips)


def continue_stages(past: Curriculum, recipe: Recipe, sample: int) -> Curriculum:
    """Plans the stages of a run that resumes at ``sample``, the start of a batch, under the current recipe.

    Later phases may be changed, added and removed. The current phase may change its end and its batch size;
    another mixture needs a new phase after it.

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
                f"no longer ends at token {stage.end_sample * past.sample_tokens:,}, as it did in this run",
                key=f"data.phases[{stage.phase}]",
                remedy="leave the phase as it was and change later phases",
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
    """Converts a curriculum to plain values that :func:`from_json` reads back."""
    return asdict(curriculum)


def from_json(tree: Mapping[str, Any]) -> Curriculum:
    """Reads the curriculum that :func:`to_json` wrote."""
    edits = tuple(
        Edit(edit["batch"], edit["sample"], tuple(Stage(**stage) for stage in edit["replaced"]))
        for edit in tree["edits"]
    )
    skips = tuple(Skip(**skip) for skip in tree.get("skips", []))
    return Curriculum(tuple(Stage(**stage) for stage in tree["stages"]), tree["sample_tokens"], edits, skips)


def _append(recipe: Recipe, stages: list[Stage], *, phases_from: int) -> list[Stage]:
    """Returns the stages followed by one for each phase from ``phases_from`` on."""
    stages = list(stages)
    for number, phase in enumerate(phases_of(recipe)):
        if number < phases_from:
            continue
        assert phase.sequence_tokens is not None and phase.rope_theta is not None
        first = stages[-1].end_sample if stages else 0
        left = _end_sample(recipe, number) - first
        if left <= 0:
            raise UserError(
                f"ends at token {_end_sample(recipe, number) * recipe.data.sequence_tokens:,}, within the "
                "last batch of the previous phase",
                key=f"data.phases[{number}].tokens",
                remedy="lengthen it by at least a batch, or remove it",
            )
        step, batch = phase.sequence_tokens // recipe.data.sequence_tokens, batch_sequences(recipe, phase)
        shares, spm = _fill_in_middle(phase)
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
                fill_in_middle=shares,
                spm=spm,
            )
        )
    return stages


def _fill_in_middle(phase: Phase) -> tuple[dict[str, float], float]:
    """Returns a phase's shares of fill-in-the-middle by domain, and that of its second order."""
    shares = fill_in_middle_shares(phase)
    assert phase.fill_in_middle is not None
    return shares, phase.fill_in_middle.spm if shares else 0.0


def fill_in_middle_in_words(shares: Mapping[str, float], spm: float) -> str:
    """Describes a stage's fill-in-the-middle: the share of each domain, and of the second order."""
    if not shares:
        return "none"
    return ", ".join([*(f"{name} {share}" for name, share in shares.items()), f"SPM {spm}"])


def _end_sample(recipe: Recipe, number: int) -> int:
    """Returns the sample at which the tokens of a phase and of all phases before it are reached."""
    tokens = sum(phase_tokens(phase) for phase in phases_of(recipe)[: number + 1])
    return -(-tokens // recipe.data.sequence_tokens)


def _whole_batches(samples: int, batch_samples: int) -> int:
    return -(-samples // batch_samples) * batch_samples


def _require_same(stage: Stage, recipe: Recipe, *, is_over: bool, sample: int) -> None:
    """Raises if the recipe's phase differs from what a stage was trained with up to ``sample``."""
    key = f"data.phases[{stage.phase}]"
    tokens = sample * recipe.data.sequence_tokens
    phases = phases_of(recipe)
    remedy = "leave the phase as it was and change later phases"
    if not is_over:
        remedy = (
            f"leave the phase as it was, end it at token {tokens:,} with stop_after_tokens, and add another "
            "phase after it"
        )
    if len(phases) <= stage.phase:
        raise UserError(f"was removed, but was read up to token {tokens:,}", key=key, remedy=remedy)
    phase = phases[stage.phase]
    assert phase.sequence_tokens is not None
    was_and_is: dict[str, tuple[object, object]] = {
        "weights": (stage.weights, phase.weights),
        "end_weights": (stage.end_weights, phase.end_weights),
        "sequence_tokens": (stage.sequence_samples * recipe.data.sequence_tokens, phase.sequence_tokens),
        "learning_rate_scale": (stage.learning_rate_scale, phase.learning_rate_scale),
        "rope_theta": (stage.rope_theta, phase.rope_theta),
        "fill_in_middle": (
            fill_in_middle_in_words(stage.fill_in_middle, stage.spm),
            fill_in_middle_in_words(*_fill_in_middle(phase)),
        ),
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
        raise UserError(f"ends before token {tokens:,}, up to which it was read", key=key, remedy=remedy)


def _stage_segments(stage: Stage, number: int) -> Iterator[MixtureSegment]:
    """Yields the mixture segments of a stage."""
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
    """Mean progress from the first weights to the last over a part of the ramp, all in 0..1."""

    def integral(at: float) -> float:
        if interpolation == Interpolation.linear.value:
            return at * at / 2
        return at / 2 - math.sin(math.pi * at) / (2 * math.pi)

    return (integral(end) - integral(begin)) / (end - begin)
