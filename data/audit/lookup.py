"""Looks up the documents of a step, and the steps of a document."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.audit.run_data import LoggedStep, RunData
from data.explore.sample import Finder
from data.order.plan import OrderPlan
from data.shards.packing import PADDING
from data.shards.streams import ShardFolder
from train.recipe.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A piece of a document at a position of training."""

    position: int
    domain: str
    sample: int
    """Number in the domain's training shards."""
    epoch: int
    document: str
    tokens: int


@dataclass(frozen=True)
class Trace:
    """A piece of a document that a step was trained on."""

    step: int
    position: int
    domain: str
    sample: int
    """Number in the domain's training shards."""
    epoch: int
    document: str
    tokens: int


def documents_of_step(run: RunData, step: int) -> list[Trace]:
    """Lists the documents that a step was trained on, in the order of the batch.

    Raises:
        UserError: if the data log has no such step.
    """
    line = _line_of(run, step)
    assert line.first is not None
    pieces = documents_at(run.plan, run.shards, run.documents_file, line.first, line.samples)
    return [Trace(step, **asdict(piece)) for piece in pieces]


@dataclass(frozen=True)
class SequenceText:
    """A sequence of a step as the model has read it."""

    position: int
    domain: str
    documents: list[str]
    """Text of each document in it, in the order that it was read in; special tokens by name."""


def texts_of_step(run: RunData, step: int) -> list[SequenceText]:
    """Decodes the sequences that a step was trained on, in the order of the batch, without padding.

    Raises:
        UserError: if the data log has no such step, or a shard is missing or altered.
    """
    line = _line_of(run, step)
    assert line.first is not None
    picks, found = run.plan.samples(line.first, line.samples), []
    for at in range(0, line.samples, line.stride):
        domain, position = run.plan.domains[int(picks.domain[at])], line.first + at
        samples = run.read(line, domain, picks.sample[at : at + line.stride], position)
        texts = [
            run.data.tokenizer.decode(part.tolist())
            for sample in samples
            for part, document in zip(
                np.split(sample.tokens, np.cumsum(sample.lengths)[:-1]), sample.documents, strict=True
            )
            if document != PADDING
        ]
        found.append(SequenceText(position, domain, texts))
    return found


def documents_at(
    plan: OrderPlan,
    shards: Mapping[str, ShardFolder],
    documents_file: Callable[[str], Path | None],
    first: int,
    samples: int,
) -> list[Piece]:
    """Lists every piece of a document at a range of positions, in order.

    Args:
        plan: the order of the run.
        shards: shards of each domain.
        documents_file: returns the list of a domain's documents, which is read up to the last one needed;
            if it returns None, documents are named by their number in the list, `#7`.
        first: first position.
        samples: number of positions.

    Raises:
        UserError: one line that names a shard or a list that is missing or altered.
    """
    picks = plan.samples(first, samples)
    found: list[tuple[int, str, int, int, int, int]] = []
    for offset in range(samples):
        domain, number = plan.domains[int(picks.domain[offset])], int(picks.sample[offset])
        sample = shards[domain][number]
        for document, tokens in zip(sample.documents.tolist(), sample.lengths.tolist(), strict=True):
            if document != PADDING:
                found.append((first + offset, domain, number, int(picks.epoch[offset]), document, tokens))
    names = {
        domain: _names(documents_file(domain), {piece[4] for piece in found if piece[1] == domain})
        for domain in {piece[1] for piece in found}
    }
    return [
        Piece(position, domain, number, epoch, names[domain][document], tokens)
        for position, domain, number, epoch, document, tokens in found
    ]


def steps_of_document(run: RunData, name: str) -> list[Trace]:
    """Lists every time that the run trained on a document, by inverting the plan; reads only its own samples.

    Raises:
        UserError: if no domain has a document of that name.
    """
    found, is_known, end = [], False, max(((s.first or 0) + s.samples for s in run.steps), default=0)
    for domain in run.plan.domains:
        for ordinal, line in _lines_of(run.documents_file(domain), name):
            is_known = True
            if line.get("split", "train") == "train":
                found += list(_sights(run, domain, ordinal, name, end))
    if not is_known:
        raise UserError(
            f"no domain has a document {name!r}", remedy="give its full name as in documents.jsonl"
        )
    return sorted(found, key=lambda sight: sight.position)


def _line_of(run: RunData, step: int) -> LoggedStep:
    line = next((it for it in run.steps if it.step == step), None)
    if line is None or line.first is None:
        last = run.steps[-1].step if run.steps else 0
        raise UserError(
            f"the data log has no usable line for step {step}", remedy=f"it has steps 1 to {last}"
        )
    return line


def _sights(run: RunData, domain: str, ordinal: int, name: str, end: int) -> Iterator[Trace]:
    folder = run.shards[domain]
    for number in Finder(folder).samples_of(ordinal):
        sample = folder[number]
        tokens = int(sample.lengths[sample.documents == ordinal].sum())
        for epoch, position in enumerate(run.plan.positions_of(domain, number, end)):
            step = run.step_at(position)
            if step is not None:
                yield Trace(step, position, domain, number, epoch, name, tokens)


def _lines_of(file: Path, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbers and lines of the documents with a name; others are not parsed, since there may be billions."""
    needle = json.dumps(name).encode()
    with file.open("rb") as lines:
        for ordinal, text in enumerate(lines):
            if needle in text and (line := json.loads(text))["name"] == name:
                yield ordinal, line


def _names(file: Path | None, ordinals: set[int]) -> dict[int, str]:
    if file is None:
        return {ordinal: f"#{ordinal}" for ordinal in ordinals}
    last = max(ordinals, default=-1)
    with file.open("rb") as lines:
        wanted = ((n, line) for n, line in zip(range(last + 1), lines, strict=False) if n in ordinals)
        return {n: json.loads(line)["name"] for n, line in wanted}
