"""First stage: cleans, scores and filters a chunk's records, and computes their signatures.

With ``data.preparation.keep_cleaned`` these are two stages: one cleans and scores all records, and its files
stay; the other chooses from them.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.manifest import SCORES_FILE
from data.text.conversations import ChatFormat, ConversationError, Spans, render
from data.text.duplicates import SKETCH, sketch, sketch_without_words
from data.text.edited_items import open_edited_items
from data.text.evaluation_overlap import open_evaluation_texts
from data.text.inputs import Chunk
from data.text.job import ArrayFile, PreparationJob, Result
from data.text.licences import canonical_of
from data.text.personal import KINDS, count, find, replaced
from data.text.scores import ScoredText, ScoreRows, groups_of, score, violation
from data.text.source_records import SourceRecord, read_records
from data.text.words import hash_words
from train.recipe.preparation import PersonalData, Quality, Source, SourceKind
from train.record.files import whole_file, write_whole

STAGE, SCORE = "clean", "score"
DIGESTS, SKETCHES, SIZES, NAMES = "digests.npy", "sketches.npy", "sizes.npy", "names.jsonl"
"""Files of a chunk: SHA-256 [N, 32], `data.text.duplicates.SKETCH` [N], bytes [N], and a name a line."""
TEXTS, REPOSITORIES = "texts.jsonl", "repositories.jsonl"
"""Files of a chunk: a name and a text a line; where they have any, a repository and a path in it a line."""
RECORDS = "records.jsonl"
KEPT = "kept"
"""Among the rules of a language, the texts that violate none."""
_CONTROL = bytes(code for code in [*range(32), 127] if chr(code) not in "\t\n\r")
_BYTE_ORDER_MARK = "\ufeff"
_FIRST_MARK, _LAST_MARK = 0x300, 0x1FFFF
_MOST_MARKS = 100
"""Combining marks in a row that are put in order together; the time grows with the square of their number."""


@dataclass(frozen=True)
class _Judged:
    """A record, normalised, and what is known of it before any filter."""

    record: SourceRecord
    """With the reason why there is no text, if there is none."""
    scored: ScoredText
    is_evaluation: Callable[[], bool]
    """Whether it has text of the evaluation tasks."""
    sketch: Callable[[], np.ndarray[Any, Any]]
    """Its `data.text.duplicates.SKETCH` [1]."""


def clean(job: PreparationJob, chunk: Chunk) -> Result:
    """Writes the documents that pass, their digests, sizes, signatures and scores, and the rejected records.

    Returns:
        Counts of ``kept`` documents, of those ``in_repositories`` and of ``rejected`` ones by reason, their
        ``kept_bytes`` and ``rejected_bytes`` and, for a source with filters, by language how many texts each
        rule rejected and how many are kept.
    """
    return job.once(STAGE, chunk.number, lambda: _clean(job, chunk))


def keeps_cleaned(job: PreparationJob) -> bool:
    """Returns whether cleaning is a stage of its own, whose files stay."""
    return job.preparation.keep_cleaned and not job.spooled


def score_all(job: PreparationJob, chunk: Chunk) -> Result:
    """Writes all records of a chunk with their scores and signatures, for :func:`clean` to choose from."""
    return job.once(SCORE, chunk.number, lambda: _score_all(job, chunk))


def normalise(text: str, *, keeps_indentation: bool = False) -> str:
    """Normalises text to NFC and line feeds; strips control characters, outer blanks and byte-order marks.

    Args:
        text: the text.
        keeps_indentation: keep the blanks before the first word, of the line that it is in.
    """
    text = normalise_characters(text.lstrip(_BYTE_ORDER_MARK)).rstrip()
    bare = text.lstrip()
    begin = text.rfind("\n", 0, len(text) - len(bare)) + 1 if keeps_indentation else len(text) - len(bare)
    return text[begin:] + "\n"


def normalise_characters(text: str) -> str:
    """Normalises text to NFC and line feeds, without control characters; outer white space stays."""
    text = _nfc(text).replace("\r\n", "\n").replace("\r", "\n")
    # As bytes, of which none within another character is one of these: faster than a regular expression.
    return text.encode("utf-8", "surrogatepass").translate(None, _CONTROL).decode("utf-8", "surrogatepass")


def read_documents(job: PreparationJob, number: int) -> Iterator[tuple[str, str]]:
    """Yields name and text of each clean document of a chunk."""
    return read_texts(job.file(STAGE, number, TEXTS))


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of each document in a file of :func:`write_texts`."""
    with path.open("rb") as stream:
        for line in stream:
            name, text, *_ = json.loads(line)
            yield name, text


def write_texts(path: Path, documents: Sequence[tuple[str, str] | tuple[str, str, Spans]]) -> None:
    """Writes names and texts, and of conversations what is to be learnt, a line of JSON for each document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, b"".join(map(line_of, documents)), sync=False)


def line_of(tree: object) -> bytes:
    """A value as a line of JSON."""
    return json.dumps(tree, ensure_ascii=False).encode() + b"\n"


def _clean(job: PreparationJob, chunk: Chunk) -> Result:
    kept = rejected_bytes = kept_bytes = named = 0
    source = job.sources[chunk.source]
    languages: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()

    def path(name: str) -> Path:
        return job.file(STAGE, chunk.number, name)

    # Each document is written as it is read: a compressed file of any size is one chunk.
    with ExitStack() as files:
        texts, names, rejected = (
            files.enter_context(whole_file(path(name))) for name in (TEXTS, NAMES, "rejected.jsonl")
        )
        repositories = files.enter_context(whole_file(path(REPOSITORIES))) if source.repositories else None
        sketches = files.enter_context(ArrayFile(path(SKETCHES), SKETCH))
        digests = files.enter_context(ArrayFile(path(DIGESTS), np.uint8, (32,)))
        sizes = files.enter_context(ArrayFile(path(SIZES), np.int64))
        groups = frozenset() if job.spooled else groups_of(source, job.preparation)
        rows = files.enter_context(ScoreRows(path(SCORES_FILE), groups))
        for it in _judged_before(job, chunk) if keeps_cleaned(job) else _judged(job, chunk):
            record, reason = it.record, _reason(it, source)
            if source.quality is Quality.prose and not record.spans:  # Anything else may be code.
                record = replace(record, text=record.text.lstrip())
            if it.scored.language and not record.reason:
                rule = "language" if reason.startswith("language: ") else reason or KEPT
                languages.setdefault(it.scored.language, Counter())[rule] += 1
                rows.add(record.place, reason, it.scored, record.text)
            if reason:
                line = {"place": record.place, "reason": reason}
                rejected.write(json.dumps(line, sort_keys=True).encode() + b"\n")
                reasons[reason.partition(": ")[0]] += 1
                rejected_bytes += record.size or len(record.text.encode())
                continue
            kept += 1
            document = (record.place, record.text)
            texts.write(line_of(document if not record.spans else (*document, record.spans)))
            names.write(json.dumps(record.place).encode() + b"\n")
            if repositories:
                repositories.write(line_of([record.repository, record.path]))
                named += bool(record.repository)
            content = record.text.encode()
            sketches.add(it.sketch())
            digests.add(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
            sizes.add([len(content)])
            kept_bytes += len(content)
    return {
        "kept": kept,
        "kept_bytes": kept_bytes,
        "in_repositories": named,
        "rejected": dict(sorted(reasons.items())),
        "rejected_bytes": rejected_bytes,
        "languages": {language: dict(sorted(rules.items())) for language, rules in sorted(languages.items())},
    }


def _reason(judged: _Judged, source: Source) -> str:
    """Why a record is rejected; empty if it is kept."""
    reason = judged.record.reason or violation(judged.scored, source)
    return reason or ("evaluation text" if judged.is_evaluation() else "")


def _score_all(job: PreparationJob, chunk: Chunk) -> Result:
    records = 0
    with ExitStack() as files:
        lines = files.enter_context(whole_file(job.file(SCORE, chunk.number, RECORDS)))
        sketches = files.enter_context(ArrayFile(job.file(SCORE, chunk.number, SKETCHES), SKETCH))
        for it in _judged(job, chunk):
            record, is_evaluation = it.record, False
            if not record.reason:
                is_evaluation = it.is_evaluation()
                sketches.add(it.sketch())
            facts = [record.place, record.text, record.reason, record.size, record.spans]
            facts += [record.repository, record.path]
            lines.write(line_of([facts, asdict(it.scored), is_evaluation]))
            records += 1
    return {"records": records}


def _judged_before(job: PreparationJob, chunk: Chunk) -> Iterator[_Judged]:
    """Yields what :func:`score_all` has written."""
    sketches = iter(np.load(job.file(SCORE, chunk.number, SKETCHES)))
    with job.file(SCORE, chunk.number, RECORDS).open("rb") as lines:
        for line in lines:
            (place, text, reason, size, spans, repository, path), scored, is_evaluation = json.loads(line)
            spans = tuple((a, b) for a, b in spans)
            record = SourceRecord(place, text, reason, size, spans=spans, repository=repository, path=path)
            own = np.empty(0, SKETCH) if reason else next(sketches)
            yield _Judged(
                record, ScoredText(**scored), partial(bool, is_evaluation), partial(np.asarray, own)
            )


def _judged(job: PreparationJob, chunk: Chunk) -> Iterator[_Judged]:
    """Yields each record, normalised and scored."""
    source, preparation = job.sources[chunk.source], job.preparation
    if job.spooled:
        for name, text in read_texts(Path(chunk.inputs[0].path)):
            yield _with_words(job, SourceRecord(name, text), text, ScoredText())
        return
    groups = groups_of(source, preparation)
    for raw in read_records(chunk, source, preparation.max_document_bytes):
        counts: dict[str, float | None] = {}
        if raw.turns:
            treated, counts = _with_treated_turns(raw, source)
            record = _conversation(treated, job.chat if source.kind is SourceKind.chat else None)
            words = treated.text
        else:
            words = "" if raw.reason else normalise(raw.text, keeps_indentation=True)
            words, counts = _treated(words, source)
            reason = raw.reason or ("" if words.strip() else "empty")
            file = raw.repository, raw.path
            record = SourceRecord(raw.place, words, reason, raw.size, repository=file[0], path=file[1])
        scored = ScoredText()
        if not record.reason:
            scored = score(words, source, groups, canonical_of(raw.licence), counts)
        yield _with_words(job, replace(record, place=f"{source.dataset}/{raw.place}"), words, scored)


def _is_evaluation(job: PreparationJob, text: str, words: np.ndarray[Any, Any]) -> bool:
    """Returns whether a document has text of the evaluation tasks."""
    if not job.evaluation_files:
        return False
    preparation = job.preparation
    if open_evaluation_texts(job.evaluation_files, preparation.evaluation_ngram).touches(words):
        return True
    share = preparation.evaluation_share
    return share is not None and open_edited_items(job.evaluation_files, share).touches(text)


def _treated(text: str, source: Source) -> tuple[str, dict[str, float | None]]:
    """Returns a text as the source's ``pii`` says, and how much personal data of each kind it had."""
    if source.pii is PersonalData.off:
        return text, {}
    found = find(text)
    return replaced(text, found) if source.pii is PersonalData.replace else text, count(found)


def _with_treated_turns(raw: SourceRecord, source: Source) -> tuple[SourceRecord, dict[str, float | None]]:
    if source.pii is PersonalData.off:
        return raw, {}
    treated = [(role, *_treated(words, source)) for role, words in raw.turns]
    turns = tuple((role, words) for role, words, _ in treated)
    counts = {kind: sum(of[kind] or 0.0 for _, _, of in treated) for kind in KINDS}
    return replace(raw, turns=turns, text="\n".join(words for _, words in turns)), {**counts}


def _with_words(job: PreparationJob, record: SourceRecord, words: str, scored: ScoredText) -> _Judged:
    """A record, with all that follows from the hashes of its words, which are computed once if at all."""
    hashes = cache(lambda: hash_words(words))
    return _Judged(
        record,
        scored,
        lambda: _is_evaluation(job, words, hashes()),
        lambda: sketch(hashes()) if hashes().size else sketch_without_words(record.text),
    )


def _conversation(raw: SourceRecord, chat: ChatFormat | None) -> SourceRecord:
    """Returns a conversation rendered, its characters normalised, or with the reason why it can't be."""
    turns = [(role, normalise_characters(words)) for role, words in raw.turns]
    try:
        text, spans = render(turns, chat)
    except ConversationError as error:
        return replace(raw, text="", size=len(raw.text.encode()), reason=str(error))
    return replace(raw, text=text, spans=spans)


def _nfc(text: str) -> str:
    """NFC in time proportional to the text's length, whatever marks it has."""
    if text.isascii():
        return text
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    if codes.max() < _FIRST_MARK:  # Latin letters before it are composed already.
        return text
    if np.count_nonzero(_is_mark()[np.minimum(codes, _LAST_MARK)]) < _MOST_MARKS:
        return unicodedata.normalize("NFC", text)
    cuts = [0, *(match.end() for match in _many_marks().finditer(text)), len(text)]
    parts = (text[begin:end] for begin, end in itertools.pairwise(cuts))
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


@lru_cache(maxsize=1)
def _is_mark() -> np.ndarray[Any, Any]:
    """Whether each code is a combining mark, up to `_LAST_MARK`, after which none is."""
    return np.array([unicodedata.combining(chr(code)) > 0 for code in range(_LAST_MARK + 1)])


@lru_cache(maxsize=1)
def _many_marks() -> re.Pattern[str]:
    marks = "".join(map(chr, np.flatnonzero(_is_mark()).tolist()))
    return re.compile(f"[{re.escape(marks)}]{{{_MOST_MARKS}}}")
