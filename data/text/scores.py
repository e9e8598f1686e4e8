"""Scores of each document, the choice of documents by them, and the columns in which they are kept.

Scores are computed once, while documents are cleaned. Which documents are kept follows from the scores and
the source's keys, so the choice can be made again (``data.preparation.keep_cleaned``). A domain's
``scores.parquet`` has a row for every document that could be read, also those that were removed, with the
reason; a thousand of them, drawn by a hash of their place, with the beginning of their text.
"""

import hashlib
import heapq
import importlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.text.classifier import probability_of
from data.text.language import language_and_probability
from data.text.licences import permits
from data.text.personal import KINDS
from data.text.quality import CODE, PROSE, Rule, code_scores, first_violation, prose_scores
from train.recipe.errors import UserError
from train.recipe.preparation import PersonalData, Preparation, Quality, ScoreGroup, Source
from train.record.files import whole_file

RULES = {Quality.none: (), Quality.prose: PROSE, Quality.code: CODE}
LANGUAGE_PROBABILITY, CLASSIFIER = "language_probability", "classifier"
COLUMNS = {
    ScoreGroup.language: (LANGUAGE_PROBABILITY,),
    ScoreGroup.prose: tuple(rule.score for rule in PROSE),
    ScoreGroup.code: tuple(rule.score for rule in CODE),
    ScoreGroup.classifier: (CLASSIFIER,),
    ScoreGroup.personal: tuple(KINDS),
}
"""The scores of each group, in order."""
SAMPLED = 1000
"""Documents of a domain of which the file has the beginning."""
EXCERPT_CHARACTERS = 600
KEY = "key"
"""A column of chunks only: the hash of the place, by which the sample is drawn."""
ROWS = 16_384
"""Rows of a chunk that wait to be written."""


@dataclass(frozen=True)
class ScoredText:
    """Language, licence and scores of a document."""

    language: str = ""
    """Empty where no scores are computed."""
    licence: str = ""
    numbers: dict[str, float | None] | None = None
    """Scores by name; None where none are computed."""


def groups_of(source: Source, preparation: Preparation) -> frozenset[ScoreGroup]:
    """The groups of scores that a source needs; all of them if documents are kept to choose again."""
    groups = set(source.scores)
    if preparation.keep_cleaned:
        groups |= {ScoreGroup.language, ScoreGroup.prose, ScoreGroup.code}
    if source.pii is not PersonalData.off:
        groups.add(ScoreGroup.personal)
    named = {threshold.score for threshold in source.thresholds}
    groups |= {group for group, columns in COLUMNS.items() if named.intersection(columns)}
    if source.quality is not Quality.none:
        groups.add(ScoreGroup(source.quality.value))
    if source.classifier:
        groups.add(ScoreGroup.classifier)
    if groups or source.languages or source.licences:
        groups.add(ScoreGroup.language)
    return frozenset(groups)


def score(
    text: str,
    source: Source,
    groups: frozenset[ScoreGroup],
    licence: str = "",
    personal: dict[str, float | None] | None = None,
) -> ScoredText:
    """Computes the scores of a text.

    Args:
        text: the text.
        source: its source.
        groups: the groups of scores to compute.
        licence: its licence.
        personal: how much personal data of each kind it has, or had, as counted before.
    """
    if not groups:
        return ScoredText(licence=licence)
    language, probability = language_and_probability(text)
    numbers: dict[str, float | None] = {LANGUAGE_PROBABILITY: probability}
    if ScoreGroup.prose in groups:
        numbers |= prose_scores(text, language)
    if ScoreGroup.code in groups:
        numbers |= code_scores(text)
    if ScoreGroup.classifier in groups:
        assert source.classifier is not None
        numbers[CLASSIFIER] = probability_of(text, source.classifier, source.classifier_label)
    return ScoredText(language, licence, numbers | (personal or {}))


def violation(scored: ScoredText, source: Source) -> str:
    """The first of a source's filters that a document does not pass; empty if it passes all."""
    if source.languages and scored.language not in source.languages:
        return f"language: {scored.language}"
    if source.licences and not permits(scored.licence, source.licences):
        return f"licence: {scored.licence or 'none'}"
    return first_violation(scored.numbers or {}, rules_of(source))


def rules_of(source: Source) -> list[Rule]:
    """The rules of a source: those of its quality, with its thresholds in place of theirs, and the others."""
    own = {threshold.score: threshold for threshold in source.thresholds}
    published = {rule.score: rule for rule in (*PROSE, *CODE)}
    rules = [rule for rule in RULES[source.quality] if rule.score not in own]
    for name, threshold in own.items():
        reason = published[name].reason if name in published else name.replace("_", " ")
        rules.append(Rule(name, reason, threshold.at_least, threshold.at_most))
    return rules


def check_scores(source: Source, preparation: Preparation, key: str) -> None:
    """Rejects thresholds of no score, and a classifier that is not there.

    Raises:
        UserError: one line that names the key.
        ModuleNotFoundError: if scores are asked for and can't be written.
    """
    if groups_of(source, preparation):
        importlib.import_module("pyarrow")
    known = [name for columns in COLUMNS.values() for name in columns]
    for n, threshold in enumerate(source.thresholds):
        here = f"{key}.thresholds[{n}]"
        if threshold.score not in known:
            remedy = f"choose from {', '.join(sorted(known))}"
            raise UserError(f"{threshold.score} is no score", key=f"{here}.score", remedy=remedy)
        bounds = [it for it in (threshold.at_least, threshold.at_most) if it is not None]
        if not bounds:
            raise UserError("has no bound", key=here, remedy="give at_least or at_most")
        if not all(map(math.isfinite, bounds)) or bounds != sorted(bounds):
            what = f"no score is between {' and '.join(map(str, bounds))}"
            raise UserError(what, key=here, remedy="give numbers, at_least below at_most")
        if threshold.score in [it.score for it in source.thresholds[:n]]:
            what = f"{threshold.score} has bounds already"
            raise UserError(what, key=f"{here}.score", remedy="give both bounds in one item")
    reads = {ScoreGroup.classifier for it in source.thresholds if it.score == CLASSIFIER}
    if ScoreGroup.classifier in reads | set(source.scores) and not source.classifier:
        remedy = "name a fastText model"
        raise UserError("is null, but its score is asked for", key=f"{key}.classifier", remedy=remedy)
    counts = {ScoreGroup.personal for it in source.thresholds if it.score in KINDS}
    if ScoreGroup.personal in counts | set(source.scores) and source.pii is PersonalData.off:
        what = "is off, but the personal data of texts is asked for"
        raise UserError(what, key=f"{key}.pii", remedy="set it to count or replace")
    if source.classifier:
        probability_of("", source.classifier, source.classifier_label, key)


class ScoreRows:
    """Writes the scores of a chunk's documents, in a ``with`` statement; without groups there is no file."""

    def __init__(self, path: Path, groups: frozenset[ScoreGroup]) -> None:
        self._path = path
        self._names = [name for group in COLUMNS if group in groups for name in COLUMNS[group]]
        self._rows: list[dict[str, Any]] = []
        self._few: list[int] = []
        self._files = ExitStack()

    def __enter__(self) -> "ScoreRows":
        if self._names:
            import pyarrow
            from pyarrow import parquet

            self._schema = schema_of(self._names).append(pyarrow.field(KEY, pyarrow.int64()))
            stream = self._files.enter_context(whole_file(self._path))
            writer = parquet.ParquetWriter(stream, self._schema, compression="zstd")
            self._writer = self._files.enter_context(writer)
        return self

    def add(self, place: str, reason: str, scored: ScoredText, text: str) -> None:
        """Adds a document; an empty reason if it is kept."""
        if scored.numbers is None:
            return
        key = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "little")
        facts = {"place": place, "reason": reason, "language": scored.language, "licence": scored.licence}
        numbers = {name: scored.numbers[name] for name in self._names}
        excerpt = text[:EXCERPT_CHARACTERS] if self._may_be_sampled(key) else None
        self._rows.append(facts | numbers | {"excerpt": excerpt, KEY: key})
        if len(self._rows) == ROWS:
            self._write()

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._names:
            self._write()
        self._files.__exit__(*error)

    def _may_be_sampled(self, key: int) -> bool:
        """Returns whether a key is among the lowest so far, as those of the domain's sample are."""
        if len(self._few) < SAMPLED:
            heapq.heappush(self._few, -key)
            return True
        return -heapq.heappushpop(self._few, -key) != key

    def _write(self) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


def schema_of(names: Sequence[str]) -> Any:
    """The columns of a domain's scores, with these scores."""
    import pyarrow

    texts = [(name, pyarrow.string()) for name in ("place", "split", "reason", "language", "licence")]
    numbers = [(name, pyarrow.float32()) for name in names]
    return pyarrow.schema([*texts, *numbers, ("excerpt", pyarrow.string())])
