"""Losses between sources and shards: which files and sources lost most or all of their records.

Every record is listed in ``rejected.jsonl``, but a file counts there as one line, however large it is, and
nobody reads a million lines. So a source of which nothing can be read is refused, and the rest is summarised
in a few lines for each source, which the manifest keeps.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.text.clean import KEPT
from data.text.clean import STAGE as CLEAN
from data.text.conversations import CONVERSATION
from data.text.decide import Decision
from data.text.file_listing import named
from data.text.inputs import Chunk, places_of_sources
from data.text.job import PreparationJob, Result
from data.text.language import UNDETERMINED
from data.text.source_records import BAD_JSON, EMPTY_FILE, NO_TEXT, UNREADABLE
from train.recipe.errors import UserError
from train.record.tables import text_table

ENCODING = "encoding"
_CAN_NOT_BE_READ = {UNREADABLE, EMPTY_FILE, NO_TEXT, BAD_JSON, ENCODING, CONVERSATION}


@dataclass
class _Tally:
    """Records of a source or of one of its files."""

    records: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, kept: int, reasons: Counter[str]) -> None:
        self.kept += kept
        self.records += kept + reasons.total()
        self.reasons += reasons

    @property
    def lost_most(self) -> bool:
        return 2 * self.kept < self.records


def require_readable_sources(job: PreparationJob, chunks: list[Chunk], cleaned: list[Result]) -> None:
    """Refuses a source of which no record at all could be read.

    Raises:
        UserError: one line that names the source's key, what is wrong and with which record.
    """
    if job.spooled:
        return
    for n, at in places_of_sources(chunks).items():
        mine = [(chunks[place], cleaned[place]) for place in at]
        reasons: Counter[str] = sum((Counter(result["rejected"]) for _, result in mine), Counter())
        if any(result["kept"] for _, result in mine) or not reasons or set(reasons) - _CAN_NOT_BE_READ:
            continue
        most = reasons.most_common(1)[0][0]
        first = next(line for chunk, _ in mine for line in _rejected(job, chunk, most))
        raise UserError(
            f"{job.sources[n].dataset} gave no text: of {_words(reasons)} the first is {first['place']}, "
            f"{first['reason']}",
            key=f"data.sources[{n}].{'text_column' if most == NO_TEXT else 'path'}",
            remedy=_REMEDIES.get(most, "replace the files, or remove the source"),
        )


def losses_of(
    job: PreparationJob,
    chunks: list[Chunk],
    cleaned: list[Result],
    decision: Decision,
    places: dict[int, list[int]],
) -> list[str]:
    """Returns a line for each source of a domain that lost most of its records, and for its lost files.

    Args:
        job: the job.
        chunks: all chunks.
        cleaned: the first stage's result for each chunk.
        decision: the second stage's.
        places: the chunks of each source of the domain, in both lists.
    """
    if job.spooled:
        return []
    lines: list[str] = []
    for n, at in places.items():
        rejected = [Counter(cleaned[number]["rejected"]) + decision.copies[number] for number in at]
        kept = [cleaned[number]["kept"] - decision.copies[number].total() for number in at]
        mine = list(zip([chunks[number] for number in at], kept, rejected, strict=True))
        lines += [f"{job.sources[n].dataset}: {line}" for line in _lines_of(job, mine)]
    return lines


def table_of_languages(job: PreparationJob, cleaned: list[Result], chunks: list[Chunk]) -> str:
    """Tells which rule removed how many documents of which language, as a table; empty without filters.

    Args:
        job: the job.
        cleaned: the first stage's result for each chunk.
        chunks: all chunks.
    """
    found: dict[tuple[int, str], Counter[str]] = {}
    for chunk, result in zip(chunks, cleaned, strict=True):
        for language, rules in result["languages"].items():
            found.setdefault((chunk.source, language), Counter()).update(rules)
    rows = []
    for (source, language), rules in sorted(
        found.items(), key=lambda it: (it[0][0], -it[1].total(), it[0][1])
    ):
        kept, count = rules.pop(KEPT, 0), rules.total()
        removed = ", ".join(
            f"{n:,} {rule}" for rule, n in sorted(rules.items(), key=lambda it: (-it[1], it[0]))
        )
        name = "unknown" if language == UNDETERMINED else language
        rows.append((job.sources[source].dataset, name, f"{kept + count:,}", f"{kept:,}", removed))
    heads = ("dataset", "language", "documents", "kept", "removed by rule")
    return text_table(heads, rows, "<<>><") if rows else ""


_REMEDIES = {
    NO_TEXT: "name the column or key of the text",
    BAD_JSON: "give one JSON object per line",
    ENCODING: "give text in UTF-8",
    CONVERSATION: "give objects with `prompt` and `response`, or of kind chat with `messages`",
}


def _lines_of(job: PreparationJob, chunks: list[tuple[Chunk, int, Counter[str]]]) -> Iterator[str]:
    whole = _Tally()
    files: dict[str, _Tally] = {}
    for chunk, kept, reasons in chunks:
        whole.add(kept, reasons)
        if len(chunk.inputs) == 1:
            files.setdefault(chunk.inputs[0].name, _Tally()).add(kept, reasons)
        else:  # Each file is a record.
            for reason in reasons.keys() & _CAN_NOT_BE_READ:
                for line in _rejected(job, chunk, reason):
                    name = line["place"].removeprefix(f"{job.sources[chunk.source].dataset}/")
                    files.setdefault(name, _Tally()).add(0, Counter([reason]))
    if whole.lost_most:
        yield f"kept {whole.kept:,} of {whole.records:,} records ({_words(whole.reasons)})"
    broken = [name for name, file in files.items() if file.reasons[UNREADABLE]]
    if broken:
        yield f"damaged, so that some or all of it could not be read: {named(broken)}"
    gone = [name for name, file in files.items() if not file.kept and name not in broken]
    if gone:
        reasons = sum((files[name].reasons for name in gone), Counter())
        yield f"nothing kept of {named(gone)} ({_words(reasons)})"
    most = [name for name, file in files.items() if file.kept and file.lost_most and name not in broken]
    if most:
        reasons = sum((files[name].reasons for name in most), Counter())
        yield f"less than half kept of {named(most)} ({_words(reasons)})"


def _words(reasons: Counter[str]) -> str:
    """The most frequent reasons with their numbers; equal numbers by name, so that no order matters."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered[:4])


def _rejected(job: PreparationJob, chunk: Chunk, reason: str) -> Iterator[dict[str, str]]:
    """Yields the chunk's rejected records with a reason, as they are listed."""
    with job.file(CLEAN, chunk.number, "rejected.jsonl").open("rb") as lines:
        for text in lines:
            line: dict[str, str] = json.loads(text)
            if line["reason"].partition(": ")[0] == reason:
                yield line
