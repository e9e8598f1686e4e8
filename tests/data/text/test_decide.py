"""Verdicts on documents in files are those in memory, one by one, with any engine and limits."""

import json
import resource
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data.text import signature_store
from data.text.clean import DIGESTS, NAMES, SIZES, SKETCHES
from data.text.clean import STAGE as CLEAN
from data.text.components import LINK, components
from data.text.decide import REMOVED, TRAIN, VALIDATION, decide, store_signatures
from data.text.decide import STAGE as DECIDE
from data.text.documents import write_documents
from data.text.duplicates import BANDS, PERMUTATIONS, SKETCH, first_of_component, resolve
from data.text.engines import Engine, Processes, Spark
from data.text.inputs import Chunk
from data.text.job import ArrayFile, Limits, PreparationJob
from data.text.row_files import Rows, WrittenRows, group_rows, read_rows, sort_rows, write_rows
from data.text.split import share_of
from tests.data.text.test_split import held_out
from train.recipe.errors import UserError
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import Tokenizer

SMALL = Limits(span_documents=200, buffer_bytes=20_000, sort_bytes=40_000)
FACTS = {"path": "", "dataset": "", "version": "", "origin": "", "licence": ""}


@dataclass
class Corpus:
    """Documents as the first stage leaves them, in chunks of several domains."""

    digests: np.ndarray
    sketches: np.ndarray
    sizes: np.ndarray
    chunks: list[int]
    """Documents of each chunk; empty ones too."""
    first: int = 0
    """Number of the first document among those of all parts."""

    def part(self, begin: int, end: int) -> "Corpus":
        """The documents of some chunks."""
        first, last = sum(self.chunks[:begin]), sum(self.chunks[:end])
        arrays = (array[first:last] for array in (self.digests, self.sketches, self.sizes))
        return Corpus(*arrays, self.chunks[begin:end], first)


def corpus_of(documents: int, seed: int = 0, chunks: int = 23) -> Corpus:
    """Texts of which a third are like an earlier one to some degree, or like one like it, or equal."""
    rng = np.random.default_rng(seed)
    sketches = np.zeros(documents, SKETCH)
    sketches["values"] = rng.integers(0, 256, (documents, PERMUTATIONS))
    sketches["bands"] = rng.integers(0, 2**63, (documents, BANDS))
    digests = rng.integers(0, 256, (documents, 32)).astype(np.uint8)
    for n in range(1, documents):
        like = int(rng.integers(max(n - 9, 0), n) if rng.random() < 0.4 else rng.integers(0, n))
        if rng.random() < 0.3:
            same = rng.random(PERMUTATIONS) < rng.choice([0.45, 0.7, 0.79, 0.81, 0.9])
            sketches["values"][n] = np.where(same, sketches["values"][like], sketches["values"][n])
            bands = rng.permutation(BANDS)[: rng.integers(1, 6)]
            sketches["bands"][n, bands] = sketches["bands"][like, bands]
        elif rng.random() < 0.1:
            digests[n], sketches[n] = digests[like], sketches[like]
    # A bucket with hundreds of documents in every band, more rows than are sorted at once.
    sketches["bands"][rng.random(documents) < 0.3] = 7
    cuts = np.sort(rng.integers(0, documents + 1, chunks - 1))
    return Corpus(
        digests, sketches, rng.integers(1, 5000, documents), np.diff([0, *cuts, documents]).tolist()
    )


def job_of(
    folder: Path, corpus: Corpus, limits: Limits, **changes: object
) -> tuple[PreparationJob, list[Chunk]]:
    """Writes a corpus as the files of the first stage."""
    sources = tuple(Source(domain=f"d{n}", kind=SourceKind.jsonl, **FACTS) for n in (2, 0, 1))
    preparation = Preparation(**{"validation_tokens": 40_000, "validation_share": 0.2} | changes)
    job = PreparationJob(folder, sources, preparation, (), Tokenizer(), 16, False, limits=limits)
    (folder / CLEAN).mkdir(parents=True)
    start = 0
    for n, count in enumerate(corpus.chunks):
        mine = slice(start, start + count)
        for name, array in ((DIGESTS, corpus.digests), (SKETCHES, corpus.sketches), (SIZES, corpus.sizes)):
            with ArrayFile(job.file(CLEAN, n, name), array.dtype, array.shape[1:]) as file:
                file.add(array[mine])
        numbers = range(corpus.first + start, corpus.first + start + count)
        names = "".join(json.dumps(f"document {it}") + "\n" for it in numbers)
        job.file(CLEAN, n, NAMES).write_text(names)
        start += count
    return job, [Chunk(n, n % 3, (), 0, 0) for n in range(len(corpus.chunks))]


def verdicts(
    job: PreparationJob, chunks: list[Chunk], corpus: Corpus, engine: Engine
) -> tuple[np.ndarray, dict[str, tuple[str, str]]]:
    """The fate of each document, and reason and keeper of each that is a copy, as the files have them."""
    decision = decide(job, chunks, [{"kept": count} for count in corpus.chunks], engine)
    fates = [np.load(job.file(DECIDE, chunk.number, "npy")) for chunk in chunks]
    copies = {}
    for chunk, reasons, size in zip(chunks, decision.copies, decision.copied_bytes, strict=True):
        lines = job.file(DECIDE, chunk.number, "rejected.jsonl").read_text().splitlines()
        found = {line["place"]: (line["reason"], line["of"]) for line in map(json.loads, lines)}
        assert reasons.total() == len(lines) == int((fates[chunk.number] == REMOVED).sum())
        assert all(sum(it[0] == reason for it in found.values()) == n for reason, n in reasons.items())
        start = sum(corpus.chunks[: chunk.number])
        sizes = corpus.sizes[start : start + corpus.chunks[chunk.number]]
        assert size == sizes[fates[chunk.number] == REMOVED].sum()
        copies |= found
    fate = np.concatenate(fates)
    assert decision.train_bytes == corpus.sizes[fate == TRAIN].sum()
    assert sum(decision.documents.values()) == (fate != REMOVED).sum()
    return fate, copies


def expected(
    job: PreparationJob, chunks: list[Chunk], corpus: Corpus
) -> tuple[np.ndarray, dict[str, tuple[str, str]]]:
    """The same, by the simplest means."""
    words = corpus.digests.view("<u8")
    found = resolve(words[:, :2], corpus.sketches, job.preparation.near_duplicates)
    numbers = np.arange(len(words))
    stays = found.keeper == numbers
    domains = np.repeat([(chunk.number + 2) % 3 for chunk in chunks], corpus.chunks)
    sizes = [int(corpus.sizes[stays & (domains == n)].sum()) for n in range(3)]
    shares = np.array([share_of(job.preparation, size) for size in sizes])
    fate = np.where(stays, TRAIN, REMOVED)
    out = held_out(words[stays, 2], found.group[stays], domains[stays], shares)
    fate[numbers[stays][out]] = VALIDATION
    copies = {
        f"document {n}": ("exact" if found.is_exact[n] else "near", f"document {found.keeper[n]}")
        for n in numbers[~stays]
    }
    return fate, {place: (f"{kind} duplicate", of) for place, (kind, of) in copies.items()}


@pytest.mark.parametrize("seed, near, tokens", [(0, 0.8, 40_000), (1, None, 40_000), (2, 0.7, 1)])
def test_little_memory_changes_no_verdict(tmp_path: Path, seed: int, near: float | None, tokens: int):
    corpus = corpus_of(900, seed)
    changes = {"near_duplicates": near, "validation_tokens": tokens}
    job, chunks = job_of(tmp_path / "small", corpus, SMALL, **changes)
    wanted = expected(job, chunks, corpus)
    fate, copies = verdicts(job, chunks, corpus, Processes(1))
    assert np.array_equal(fate, wanted[0]) and copies == wanted[1]
    # Of one token, no group is held out by its hash, and one of each domain moves.
    assert len(copies) > 30 and (fate == VALIDATION).sum() > (20 if tokens > 1 else 2)
    kinds = {reason for reason, _ in copies.values()}
    assert kinds == {"exact duplicate", "near duplicate"} if near else {"exact duplicate"}
    assert not any(job.work.glob("*/*.rows"))
    job, chunks = job_of(tmp_path / "large", corpus, Limits(), **changes)
    again = verdicts(job, chunks, corpus, Processes(1))
    assert np.array_equal(fate, again[0]) and copies == again[1]


def test_given_documents_stay_and_no_documents_are_no_trouble(tmp_path: Path):
    corpus = corpus_of(300)
    job, chunks = job_of(tmp_path / "given", corpus, SMALL)
    fate, copies = verdicts(replace(job, spooled=True), chunks, corpus, Processes(1))
    assert not copies and not (fate == REMOVED).any() and (fate == VALIDATION).any()
    for count in (0, 1):
        job, chunks = job_of(tmp_path / f"{count}", corpus_of(count, chunks=3), SMALL)
        fate, copies = verdicts(job, chunks, corpus_of(count, chunks=3), Processes(1))
        assert fate.tolist() == [TRAIN] * count and not copies


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "spark"])
def test_engines_that_share_the_work_give_the_same_verdicts(tmp_path: Path, engine: str, spark: Spark):
    corpus = corpus_of(500, seed=5)
    job, chunks = job_of(tmp_path, corpus, replace(SMALL, sort_bytes=600_000))
    wanted = expected(job, chunks, corpus)
    fate, copies = verdicts(job, chunks, corpus, spark if engine == "spark" else Processes(2))
    assert np.array_equal(fate, wanted[0]) and copies == wanted[1]


def test_a_decision_that_was_cut_off_continues(tmp_path: Path):
    class Failing(Processes):
        """Fails at a stage of the given number."""

        def __init__(self, at: int) -> None:
            super().__init__(1)
            self.left = at

        def run(self, title, stage, job, items):
            self.left -= 1
            if not self.left:
                super().run(title, stage, job, items[:1])
                raise OSError("lost")
            return super().run(title, stage, job, items)

    corpus = corpus_of(300)
    job, chunks = job_of(tmp_path, corpus, SMALL)
    wanted = expected(job, chunks, corpus)
    for at in (2, 4, 6, 8, 11, 14):
        with pytest.raises(OSError, match="lost"):
            decide(job, chunks, [{"kept": count} for count in corpus.chunks], Failing(at))
    fate, copies = verdicts(job, chunks, corpus, Processes(1))
    assert np.array_equal(fate, wanted[0]) and copies == wanted[1]
    again = verdicts(job, chunks, corpus, Failing(1))
    assert np.array_equal(fate, again[0]), "a complete decision is read, not made again"


@pytest.mark.slow
def test_memory_does_not_grow_with_documents(tmp_path: Path):
    limits = Limits(span_documents=500, buffer_bytes=100_000, sort_bytes=200_000)
    peaks = []
    for count in (2000, 5000):
        rng = np.random.default_rng(count)
        corpus = Corpus(
            rng.integers(0, 256, (count, 32)).astype(np.uint8),
            np.frombuffer(rng.bytes(count * SKETCH.itemsize), SKETCH),
            np.full(count, 100),
            [250] * (count // 250),
        )
        job, chunks = job_of(tmp_path / str(count), corpus, limits)
        cleaned = [{"kept": it} for it in corpus.chunks]
        del corpus
        tracemalloc.start()
        decide(job, chunks, cleaned, Processes(1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks


@pytest.mark.parametrize("sort_bytes", [10**6, 160, 16])
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_rows_are_sorted_and_grouped_within_any_memory(count: int, sort_bytes: int):
    rng = np.random.default_rng(count)
    rows = np.zeros(count, [("a", "<u8"), ("b", "<i8")])
    rows["a"], rows["b"] = rng.integers(0, 5, count), rng.integers(0, 50, count)
    blocks = (rows[at : at + 3] for at in range(0, count, 3))
    ordered = list(sort_rows(blocks, ["a", "b"], replace(SMALL, sort_bytes=sort_bytes)))
    assert np.array_equal(np.concatenate([rows[:0], *ordered]), np.sort(rows, order=["a", "b"]))

    def same(one: Rows, other: Rows) -> np.ndarray:
        return one["a"] == other["a"]

    for block in group_rows(ordered, same):
        for row, first, is_first in zip(block.rows, block.first, block.is_first, strict=True):
            assert first["a"] == row["a"] and first["b"] == rows["b"][rows["a"] == row["a"]].min()
            assert not is_first or first["b"] == row["b"]


def test_rows_are_sorted_with_few_open_files(tmp_path: Path):
    """A bucket may have any number of rows, each run of which is a file until they are merged."""
    rows = np.zeros(200, [("a", "<u8"), ("b", "<i8")])
    rows["a"] = np.random.default_rng(0).permutation(200)
    blocks = (rows[at : at + 1] for at in range(200))
    taken = len(list(Path("/proc/self/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 150, hard))
    try:
        ordered = list(sort_rows(blocks, ["a"], replace(SMALL, sort_bytes=16), tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(np.concatenate(ordered)["a"], np.arange(200))


@pytest.mark.parametrize("edges", [0, 30, 100, 119])
def test_components_in_rounds_are_those_in_memory(tmp_path: Path, edges: int):
    rng = np.random.default_rng(edges)
    documents = 120
    pairs = np.sort(rng.integers(0, documents, (edges, 2)), 1)
    if edges == 119:  # one chain, in no order
        order = rng.permutation(documents)
        pairs = np.sort(np.stack([order[:-1], order[1:]], 1), 1)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    links = np.zeros(len(pairs), LINK)
    links["to"], links["node"] = pairs.T
    for limits in (
        Limits(span_documents=50, buffer_bytes=100, sort_bytes=64),
        replace(SMALL, span_documents=50),
    ):
        job, _ = job_of(tmp_path / str(limits.sort_bytes), corpus_of(documents, chunks=3), limits)
        listed = write_documents(job, [], [documents])
        with write_rows(job, "edges", 0, "links", listed.partitions) as writer:
            writer.add(links, links["node"] // 50)
        edges_of = [WrittenRows("edges", "links", 1)]
        stars = components(job, listed, Processes(1), edges_of, len(links), "near")
        least = np.arange(documents)
        for n in range(listed.partitions):
            for rows in read_rows(job, [stars], n, LINK):
                least[rows["node"]] = rows["to"]
        assert np.array_equal(least, first_of_component(pairs, documents))


def add_part(
    job: PreparationJob, chunks: list[Chunk], corpus: Corpus
) -> tuple[np.ndarray, dict[str, tuple[str, str]]]:
    """Decides a part and adds it to its store."""
    found = verdicts(job, chunks, corpus, Processes(1))
    store_signatures(job, [{"kept": count} for count in corpus.chunks], Processes(1))
    return found


@pytest.mark.parametrize("limits", [SMALL, Limits()])
def test_a_part_has_the_verdicts_that_it_has_after_the_parts_before(tmp_path: Path, limits: Limits):
    corpus = corpus_of(900, seed=4)
    job, chunks = job_of(tmp_path / "whole", corpus, limits)
    whole = expected(job, chunks, corpus)
    group = resolve(corpus.digests.view("<u8")[:, :2], corpus.sketches, 0.8).group
    store = str(tmp_path / "store")
    fates, copies = [], {}
    for n, cut in enumerate([(0, 9), (9, 15), (15, 23)]):
        part = corpus.part(*cut)
        job, chunks = job_of(tmp_path / f"part-{n}", part, limits, signatures=store)
        sources = tuple(replace(it, domain=f"{it.domain}-{n}") for it in job.sources)
        fate, found = add_part(replace(job, sources=sources), chunks, part)
        fates.append(fate)
        copies |= found
    fate = np.concatenate(fates)
    for place in (f"document {n}" for n in range(sum(corpus.chunks[:9]), 900)):
        assert copies.get(place) == whole[1].get(place)
    later = np.arange(900) >= sum(corpus.chunks[:9])
    assert np.array_equal((fate == REMOVED)[later], (whole[0] == REMOVED)[later])
    followers = np.flatnonzero(later & (fate != REMOVED) & (group < sum(corpus.chunks[:9])))
    assert followers.size > 15 and np.array_equal(fate[followers], fate[group[followers]])
    assert {fate[it] for it in followers} == {TRAIN, VALIDATION}


def test_a_store_that_can_not_be_a_folder_is_refused_at_the_start(tmp_path: Path):
    corpus, store = corpus_of(5, chunks=1), tmp_path / "file/store"
    job, _ = job_of(tmp_path / "job", corpus, SMALL, signatures=str(store))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.preparation.signatures: .*/store can't be a folder"):
        signature_store.earlier_parts(job)


def test_a_store_takes_parts_whole_and_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = corpus_of(200, seed=3, chunks=6)
    store = tmp_path / "store"

    def part(name: str, cut: tuple[int, int], folder: str) -> tuple[PreparationJob, list[Chunk], Corpus]:
        job, chunks = job_of(tmp_path / folder, corpus.part(*cut), SMALL, signatures=str(store))
        sources = tuple(replace(it, domain=f"{it.domain}-{name}") for it in job.sources)
        return replace(job, sources=sources), chunks, corpus.part(*cut)

    one = part("one", (0, 3), "one")
    first = add_part(*one)
    # The same part again is not held to itself, nor to what came after it.
    two = add_part(*part("two", (3, 6), "two"))
    again = add_part(*part("one", (0, 3), "again"))
    assert np.array_equal(again[0], first[0]) and again[1] == first[1]
    twice = add_part(*part("two", (3, 6), "twice"))
    assert np.array_equal(twice[0], two[0]) and twice[1] == two[1]
    assert len([path for path in store.iterdir() if path.is_dir()]) == 2
    # All of a part are copies of a part before that has the same documents.
    copy = verdicts(*part("three", (0, 3), "three"), Processes(1))
    assert (copy[0] == REMOVED).all() and all(it[0] == "exact duplicate" or it[1] for it in copy[1].values())
    # A part that was decided before another was added is refused, and decides again.
    job, chunks, mine = part("four", (3, 6), "four")
    cleaned = [{"kept": count} for count in mine.chunks]
    verdicts(job, chunks, mine, Processes(1))
    add_part(*part("five", (0, 3), "five"))
    with pytest.raises(UserError, match=r"data.preparation.signatures: .* got another part while"):
        store_signatures(job, cleaned, Processes(1))
    verdicts(job, chunks, mine, Processes(1))
    store_signatures(job, cleaned, Processes(1))
    monkeypatch.setitem(signature_store.PARAMETERS, "shingle_words", 7)
    with pytest.raises(
        UserError, match=r"data.preparation.signatures: .* of other parameters \(shingle_words 5\)"
    ):
        decide(*part("six", (0, 3), "six")[:2], cleaned, Processes(1))
