"""Which documents a step saw, and which steps saw a document."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from data.audit.records import RunBooks
from data.explore.sample import samples_of
from data.packing import PADDING
from train.recipe import RecipeError


@dataclass(frozen=True)
class Sight:
    """A piece of a document in a sequence that a step was trained on."""

    step: int
    position: int
    domain: str
    sample: int
    """Number in the domain's training shards."""
    epoch: int
    document: str
    tokens: int


def documents_of_step(books: RunBooks, step: int) -> list[Sight]:
    """Everything that a step saw, in the order of the batch.

    Raises:
        RecipeError: if the ledger has no such step.
    """
    line = next((it for it in books.steps if it.step == step), None)
    if line is None or line.first is None:
        last = books.steps[-1].step if books.steps else 0
        raise RecipeError(f"the ledger has no sound line of step {step}", remedy=f"it has steps 1 to {last}")
    picks = books.plan.samples(line.first, line.samples)
    pieces: list[tuple[int, str, int, int, int, int]] = []
    for offset in range(line.samples):
        domain = books.plan.domains[int(picks.domain[offset])]
        number = int(picks.sample[offset])
        sample = books.shards[domain][number]
        for document, tokens in zip(sample.documents.tolist(), sample.lengths.tolist(), strict=True):
            if document != PADDING:
                pieces.append(
                    (line.first + offset, domain, number, int(picks.epoch[offset]), document, tokens)
                )
    names = {
        domain: _names(books, domain, {piece[4] for piece in pieces if piece[1] == domain})
        for domain in {piece[1] for piece in pieces}
    }
    return [
        Sight(step, position, domain, number, epoch, names[domain][document], tokens)
        for position, domain, number, epoch, document, tokens in pieces
    ]


def steps_of_document(books: RunBooks, name: str) -> list[Sight]:
    """Every time that the run saw a document, by the plan's inverse: only its own samples are read.

    Raises:
        RecipeError: if no domain has a document of that name.
    """
    found, is_known, end = [], False, max(((s.first or 0) + s.samples for s in books.steps), default=0)
    for domain in books.plan.domains:
        for ordinal, line in enumerate(_lines(books, domain)):
            if line["name"] != name:
                continue
            is_known = True
            if line.get("split", "train") == "train":
                found += list(_sights(books, domain, ordinal, name, end))
    if not is_known:
        raise RecipeError(
            f"no domain has a document {name!r}", remedy="give its name in documents.jsonl whole"
        )
    return sorted(found, key=lambda sight: sight.position)


def _sights(books: RunBooks, domain: str, ordinal: int, name: str, end: int) -> Iterator[Sight]:
    folder = books.shards[domain]
    for number in samples_of(folder, ordinal):
        sample = folder[number]
        tokens = int(sample.lengths[sample.documents == ordinal].sum())
        for epoch, position in enumerate(books.plan.positions_of(domain, number, end)):
            step = books.step_at(position)
            if step is not None:
                yield Sight(step, position, domain, number, epoch, name, tokens)


def _lines(books: RunBooks, domain: str) -> Iterator[dict[str, str]]:
    with books.documents_file(domain).open() as file:
        for line in file:
            yield json.loads(line)


def _names(books: RunBooks, domain: str, ordinals: set[int]) -> dict[int, str]:
    return {n: line["name"] for n, line in enumerate(_lines(books, domain)) if n in ordinals}
