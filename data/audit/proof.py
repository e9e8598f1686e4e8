"""The proof that a run skipped nothing except excluded ranges and read nothing twice.

It makes five comparisons:

- The lines of the data log with each other: every step is there once, and its positions begin where those of
  the previous step end. Ranges that the recipe or the guard excluded (:mod:`train.record.skips`) must not
  have been read.
- Each line with the plan: it has as many sequences of each domain as the plan at those positions.
- Each line with the shards: the digest of the tokens that the ranks were fed equals the digest of the tokens
  in the shards, whose hashes are checked, and as many tokens had a loss as have a next token there.
- The newest checkpoint with the lines: its sums of samples and tokens by domain.
- The plan with itself: no sample of a domain is read again before all its samples were read equally often.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from data.audit.run_data import LoggedStep, RunData
from data.shards.digest import MASK, digest_sequences, with_mask
from data.shards.packing import PADDING, Sample
from train.recipe.errors import UserError

CHUNK = 1 << 20
"""Positions computed at once."""
MOST_VIOLATIONS = 50


@dataclass
class Proof:
    """The result of the comparisons."""

    steps: int = 0
    positions: int = 0
    steps_read: int = 0
    """Steps whose tokens were compared with the shards."""
    consumed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Samples and epochs of each domain."""
    declared: list[str] = field(default_factory=list)
    """Excluded ranges, with their reasons."""
    faults: list[str] = field(default_factory=list)
    """Violations."""

    @property
    def holds(self) -> bool:
        """True if there are no violations."""
        return not self.faults


def prove(run: RunData, steps_read: int | None = None, progress: bool = False) -> Proof:
    """Compares a run's records with its plan and its shards.

    Args:
        run: the run's records.
        steps_read: number of evenly spread steps whose tokens are compared with the shards; None: all.
        progress: show a progress bar.
    """
    from tqdm import tqdm

    proof = Proof(steps=len(run.steps), declared=list(_declared(run)))
    proof.faults += _check_lines(run)
    chosen = _spread(len(run.steps), steps_read)
    for number, step in enumerate(tqdm(run.steps, "steps", disable=not progress, mininterval=1)):
        if len(proof.faults) >= MOST_VIOLATIONS:
            proof.faults.append("further violations are not listed")
            return proof
        if step.first is None:
            continue
        proof.positions += step.samples
        proof.faults += _check_counts(run, step)
        if number in chosen:
            proof.faults += _check_tokens(run, step)
            proof.steps_read += 1
    proof.faults += _check_plan(run, proof)
    proof.faults += _check_checkpoint(run)
    return proof


def _check_lines(run: RunData) -> Iterator[str]:
    curriculum, trained = run.curriculum, 0
    expected_first = 0
    for step in run.steps:
        batch = step.step - 1
        expected = curriculum.trained_from(trained)
        if curriculum.trained_from(batch) != batch:
            yield f"step {step.step} was trained, although its positions are excluded"
        elif batch != expected:
            yield f"steps {expected + 1} to {batch} are missing from the data log"
        if batch != trained:
            expected_first = curriculum.samples_before(batch)
        if step.first is None:
            yield f"step {step.step}: its positions are not contiguous: some are missing or repeated"
        elif step.first < expected_first:
            yield f"step {step.step}: positions {step.first} to {expected_first - 1} were read again"
        elif step.first > expected_first:
            yield f"step {step.step}: positions {expected_first} to {step.first - 1} before it were skipped"
        expected_first = (expected_first if step.first is None else step.first) + step.samples
        trained = step.step


def _declared(run: RunData) -> Iterator[str]:
    """Lists the excluded ranges up to the end of the data log or directly after it, with their reasons."""
    curriculum = run.curriculum
    end = run.steps[-1].step if run.steps else 0
    for first, after in curriculum.skipped:
        if first > end:
            break
        begin, stop = curriculum.samples_before(first), curriculum.samples_before(after)
        reasons = [s.reason for s in curriculum.skips if s.first_sample < stop and s.end_sample > begin]
        yield (
            f"steps {first + 1} to {after}, positions {begin} to {stop - 1}: "
            f"{'; '.join(dict.fromkeys(reasons))}"
        )


def _check_counts(run: RunData, step: LoggedStep) -> Iterator[str]:
    assert step.first is not None
    picks = run.plan.samples(step.first, step.samples)
    planned = np.bincount(picks.domain, minlength=len(run.plan.domains)) // step.stride
    there = dict(zip(run.plan.domains, planned.tolist(), strict=True))
    for name in sorted({*there, *step.domains}):
        has = step.domains[name].sequences if name in step.domains else 0
        if has != there.get(name, 0):
            yield f"step {step.step}: {has} sequences of {name}, but the plan has {there.get(name, 0)}"


def _check_tokens(run: RunData, step: LoggedStep) -> Iterator[str]:
    assert step.first is not None
    picks = run.plan.samples(step.first, step.samples)
    for index, name in enumerate(run.plan.domains):
        slots = np.flatnonzero(picks.domain == index)
        if not slots.size:
            continue
        numbers = picks.sample[slots].reshape(-1, step.stride)
        positions = step.first + slots[:: step.stride]
        try:
            samples = [
                run.read(step, name, row, position)
                for row, position in zip(numbers, positions.tolist(), strict=True)
            ]
        except UserError as error:
            yield f"step {step.step}, {name}: can't be compared: {error.what}"
            continue
        places = [_places(row, each) for row, each in zip(samples, numbers, strict=True)]
        tokens = np.stack([np.concatenate([sample.tokens for sample in row]) for row in samples])
        unwanted = np.stack([has_next & ~is_target for has_next, is_target in places])
        fed = with_mask(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(unwanted)).numpy()
        digest = digest_sequences(fed, positions)
        if name not in step.domains:
            continue
        entry = step.domains[name]
        if digest & MASK != entry.digest:
            yield (
                f"step {step.step}, {name}: trained on other tokens than those of the shards at positions "
                f"{step.first} to {step.first + step.samples - 1}"
            )
        targets = sum(int(is_target.sum()) for _, is_target in places)
        if targets != entry.targets:
            yield (
                f"step {step.step}, {name}: {entry.targets} tokens had a loss, but {targets} in the shards "
                "have a next token"
            )


def _places(
    samples: Sequence[Sample], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns which tokens of a sequence have a next one that is not padding, and which of these have a loss.

    A sample's last token has a next one only if the sequence's next sample is its neighbour in the shards,
    and padding never has.
    """
    follows: list[NDArray[np.bool_]] = []
    for place, sample in enumerate(samples):
        is_text = np.repeat(sample.documents != PADDING, sample.lengths)
        joined = place > 0 and numbers[place] == numbers[place - 1] + 1
        if not joined or samples[place - 1].documents[-1] == PADDING:
            is_text[0] = False
        follows.append(is_text)
    # Of each token as the next one of that before it.
    follows_S = np.concatenate(follows)
    trained_S = np.concatenate([sample.is_trained() for sample in samples])
    end = np.zeros(1, np.bool_)
    return np.append(follows_S[1:], end), np.append((follows_S & trained_S)[1:], end)


def _check_plan(run: RunData, proof: Proof) -> Iterator[str]:
    end = max(((step.first or 0) + step.samples for step in run.steps), default=0)
    excluded = [0] * len(run.plan.sizes)
    for first, after in run.curriculum.skipped_before(run.steps[-1].step if run.steps else 0):
        begin, stop = run.curriculum.samples_before(first), run.curriculum.samples_before(after)
        before = run.plan.consumed(begin)
        for index, (name, count) in enumerate(run.plan.consumed(stop).items()):
            excluded[index] += count - before[name]
    reads = [np.zeros(size, np.uint16) for size in run.plan.sizes]
    for first in range(0, end, CHUNK):
        picks = run.plan.samples(first, min(CHUNK, end - first))
        for index, counts in enumerate(reads):
            np.add.at(counts, picks.sample[picks.domain == index], 1)
    for name, counts, less in zip(run.plan.domains, reads, excluded, strict=True):
        trained = int(counts.sum()) - less
        proof.consumed[name] = trained, trained / counts.size
        if counts.max() - counts.min() > 1:
            often, seldom = int(counts.argmax()), int(counts.argmin())
            yield (
                f"{name}: sample {often} was read {counts.max()} times before sample {seldom} was read "
                f"{counts.min() + 1} times"
            )


def _check_checkpoint(run: RunData) -> Iterator[str]:
    batch = run.progress.get("batch")
    if batch is None:
        return
    if not run.steps or run.steps[-1].step < batch:
        last = run.steps[-1].step if run.steps else 0
        yield f"the newest checkpoint is of step {batch}, but the data log ends with step {last}"
        return
    counted: dict[str, tuple[int, int]] = {}
    for step in run.steps:
        if step.step <= batch:
            for name, entry in step.domains.items():
                samples, tokens = counted.get(name, (0, 0))
                more = entry.sequences * step.stride
                counted[name] = samples + more, tokens + more * run.sample_tokens
    for name, total in run.progress.get("consumed", {}).items():
        for what, logged in zip(("samples", "tokens"), counted.get(name, (0, 0)), strict=True):
            if total[what] != logged:
                yield (
                    f"the checkpoint of step {batch} counts {total[what]} {what} of {name}, "
                    f"the data log {logged}"
                )


def _spread(count: int, wanted: int | None) -> set[int]:
    if wanted is None or wanted >= count:
        return set(range(count))
    return {number * count // wanted for number in range(wanted)}
