"""First stage: cleans and filters a chunk's records, and computes their signatures."""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.text.conversations import ChatFormat, ConversationError, Spans, render
from data.text.duplicates import SKETCH, sketch, sketch_without_words
from data.text.evaluation_overlap import open_evaluation_texts
from data.text.inputs import Chunk
from data.text.job import ArrayFile, PreparationJob, Result
from data.text.language import language_of
from data.text.quality import code_violation, prose_violation, repetition_violation
from data.text.source_records import SourceRecord, read_records
from data.text.words import hash_words
from train.recipe.preparation import Quality, Source, SourceKind
from train.record.files import whole_file, write_whole

STAGE = "clean"
DIGESTS, SKETCHES, SIZES, NAMES = "digests.npy", "sketches.npy", "sizes.npy", "names.jsonl"
"""Files of a chunk: SHA-256 [N, 32], `data.text.duplicates.SKETCH` [N], bytes [N], and a name a line."""
KEPT = "kept"
"""Among the rules of a language, the texts that violate none."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_MOST_MARKS = 100
"""Combining marks in a row that are put in order together; the time grows with the square of their number."""


def clean(job: PreparationJob, chunk: Chunk) -> Result:
    """Writes the documents that pass, their digests, sizes and signatures, and the list of rejected records.

    Returns:
        Counts of ``kept`` documents and of ``rejected`` ones by reason, the latters' ``rejected_bytes`` and,
        for a source with filters, by language how many texts each rule rejected and how many are kept.
    """
    return job.once(STAGE, chunk.number, lambda: _clean(job, chunk))


def normalise(text: str, *, keeps_indentation: bool = False) -> str:
    """Normalises text to NFC and line feeds; strips control characters and outer white space.

    Args:
        text: the text.
        keeps_indentation: keep the blanks before the first word, of the line that it is in.
    """
    text = normalise_characters(text).rstrip()
    bare = text.lstrip()
    begin = text.rfind("\n", 0, len(text) - len(bare)) + 1 if keeps_indentation else len(text) - len(bare)
    return text[begin:] + "\n"


def normalise_characters(text: str) -> str:
    """Normalises text to NFC and line feeds, without control characters; outer white space stays."""
    return _CONTROL.sub("", _nfc(text).replace("\r\n", "\n").replace("\r", "\n"))


def read_documents(job: PreparationJob, number: int) -> Iterator[tuple[str, str]]:
    """Yields name and text of each clean document of a chunk."""
    return read_texts(job.file(STAGE, number, "texts.jsonl"))


def read_spans(job: PreparationJob, number: int) -> Iterator[Spans]:
    """Yields which characters of each conversation of a chunk are to be learnt."""
    with job.file(STAGE, number, "texts.jsonl").open("rb") as stream:
        for line in stream:
            _, _, spans = json.loads(line)
            yield tuple((begin, end) for begin, end in spans)


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of each document in a file of :func:`write_texts`."""
    with path.open("rb") as stream:
        for line in stream:
            name, text, *_ = json.loads(line)
            yield name, text


def write_texts(path: Path, documents: Sequence[tuple[str, str] | tuple[str, str, Spans]]) -> None:
    """Writes names and texts, and of conversations what is to be learnt, a line of JSON for each document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(map(_line, documents)), sync=False)


def _line(document: tuple[str, str] | tuple[str, str, Spans]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def _clean(job: PreparationJob, chunk: Chunk) -> Result:
    kept, rejected_bytes = 0, 0
    source = job.sources[chunk.source]
    is_filtered = bool(source.languages) or source.quality is not Quality.none
    languages: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()

    def path(name: str) -> Path:
        return job.file(STAGE, chunk.number, name)

    # Each document is written as it is read: a compressed file of any size is one chunk.
    with ExitStack() as files:
        texts, names, rejected = (
            files.enter_context(whole_file(path(name))) for name in ("texts.jsonl", NAMES, "rejected.jsonl")
        )
        sketches = files.enter_context(ArrayFile(path(SKETCHES), SKETCH))
        digests = files.enter_context(ArrayFile(path(DIGESTS), np.uint8, (32,)))
        sizes = files.enter_context(ArrayFile(path(SIZES), np.int64))
        for record, reason, words in _judged(job, chunk):
            if is_filtered and record.text and not job.spooled:
                rule = "language" if reason.startswith("language: ") else reason or KEPT
                languages.setdefault(language_of(record.text), Counter())[rule] += 1
            if reason:
                line = {"place": record.place, "reason": reason}
                rejected.write(json.dumps(line, sort_keys=True).encode() + b"\n")
                reasons[reason.partition(": ")[0]] += 1
                rejected_bytes += record.size or len(record.text.encode())
                continue
            kept += 1
            document = (record.place, record.text)
            texts.write(_line(document if not record.spans else (*document, record.spans)))
            names.write(json.dumps(record.place).encode() + b"\n")
            content = record.text.encode()
            sketches.add(sketch(words) if words.size else sketch_without_words(record.text))
            digests.add(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
            sizes.add([len(content)])
    return {
        "kept": kept,
        "rejected": dict(sorted(reasons.items())),
        "rejected_bytes": rejected_bytes,
        "languages": {language: dict(sorted(rules.items())) for language, rules in sorted(languages.items())},
    }


def _judged(job: PreparationJob, chunk: Chunk) -> Iterator[tuple[SourceRecord, str, np.ndarray[Any, Any]]]:
    """Yields each record, normalised, with the first rule that it violates and the hashes of its words."""
    source, preparation = job.sources[chunk.source], job.preparation
    if job.spooled:
        for name, text in read_texts(Path(chunk.inputs[0].path)):
            yield SourceRecord(name, text), "", hash_words(text)
        return
    evaluation = open_evaluation_texts(job.evaluation_files, preparation.evaluation_ngram)
    none = np.empty(0, np.uint64)
    for raw in read_records(chunk, source, preparation.max_document_bytes):
        place = f"{source.dataset}/{raw.place}"
        if raw.turns:
            record, reason = _conversation(raw, job.chat if source.kind is SourceKind.chat else None)
            words = none if reason else hash_words(raw.text)
            reason = reason or _violation(raw.text, source)
            if not reason and evaluation.touches(words):
                reason = "evaluation text"
            yield replace(record, place=place), reason, words
            continue
        text = "" if raw.reason else normalise(raw.text, keeps_indentation=source.quality is Quality.code)
        reason = raw.reason or ("" if text.strip() else "empty") or _violation(text, source)
        words = none if reason else hash_words(text)
        if not reason and evaluation.touches(words):
            reason = "evaluation text"
        yield SourceRecord(place, text, size=raw.size), reason, words


def _conversation(raw: SourceRecord, chat: ChatFormat | None) -> tuple[SourceRecord, str]:
    """Returns a conversation rendered, its characters normalised, and the reason why it can't be."""
    turns = [(role, normalise_characters(words)) for role, words in raw.turns]
    try:
        text, spans = render(turns, chat)
    except ConversationError as error:
        return replace(raw, text="", size=len(raw.text.encode())), str(error)
    return replace(raw, text=text, spans=spans), ""


def _violation(text: str, source: Source) -> str:
    if source.languages and (language := language_of(text)) not in source.languages:
        return f"language: {language}"
    if source.quality is Quality.code:
        return code_violation(text)
    if source.quality is Quality.prose:
        return prose_violation(text) or repetition_violation(text)
    return ""


def _nfc(text: str) -> str:
    """NFC in time proportional to the text's length, whatever marks it has."""
    if text.isascii():
        return text
    cuts = [0, *(match.end() for match in _many_marks().finditer(text)), len(text)]
    parts = (text[begin:end] for begin, end in itertools.pairwise(cuts))
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


@lru_cache(maxsize=1)
def _many_marks() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.combining(chr(code)))
    return re.compile(f"[{re.escape(marks)}]{{{_MOST_MARKS}}}")
