"""Records of finished shards for their manifest."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.index import INDEX_FILE
from data.shards.manifest import (
    DOCUMENTS_FILE,
    FORMAT,
    REJECTED_FILE,
    SCORES_FILE,
    DatasetRecord,
    DomainRecord,
    Manifest,
    SplitRecord,
    TokenizerRecord,
    entropy,
    preparation_digest,
)
from data.text import installed
from data.text.clean import STAGE as CLEAN
from data.text.decide import STAGE as DECIDE
from data.text.decide import Decision
from data.text.inputs import Chunk, places_of_sources
from data.text.job import PreparationJob, Result
from data.text.losses import losses_of
from data.text.mds import index_text
from data.text.repositories import Portion
from data.text.scores_file import join_scores
from data.text.split import SPLITS
from data.text.tokens import ENCODE, WRITE, ShardTask, open_once
from train.recipe.preparation import (
    CONVERSATIONS,
    Packing,
    PersonalData,
    Preparation,
    Quality,
    Source,
    Threshold,
)
from train.recipe.schema import Recipe
from train.recipe.secrets import without_secrets
from train.record.files import sha256


def assemble(
    recipe: Recipe,
    job: PreparationJob,
    chunks: list[Chunk],
    decision: Decision,
    cleaned: list[Result],
    results: tuple[list[Portion], list[Result], list[ShardTask], list[Result]],
) -> Manifest:
    """Returns the manifest of a job's shards, and writes the lists and indexes next to them.

    Args:
        recipe: the recipe.
        job: the job.
        chunks: all chunks.
        decision: the second stage's results.
        cleaned: the first stage's, for each chunk.
        results: what was tokenised, with the third stage's results, and the shards, with the fourth's.
    """
    tokenizer = open_once(job.tokenizer, job.out)
    places = places_of_sources(chunks)
    portions, encoded, tasks, written = results
    shards: dict[tuple[str, str], list[tuple[ShardTask, Result]]] = {}
    for task, result in zip(tasks, written, strict=True):
        shards.setdefault((task.domain, task.split), []).append((task, result))
    tokenised: dict[str, list[tuple[Portion, Result]]] = {}
    for portion, result in zip(portions, encoded, strict=True):
        tokenised.setdefault(job.sources[portion.source].domain, []).append((portion, result))
    records = {}
    for domain in dict.fromkeys(source.domain for source in job.sources):
        mine = {n: at for n, at in places.items() if job.sources[n].domain == domain}
        splits = _splits(job, domain, tokenised.get(domain, []), shards)
        listing = [job.file(ENCODE, it.number, "documents.jsonl") for it, _ in tokenised.get(domain, [])]
        records[domain] = _domain_record(job, chunks, decision, cleaned, domain, mine, (listing, splits))
    made_by = TokenizerRecord(
        tokenizer.name,
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.pad_id,
        {file.name: sha256(file) for file in sorted(job.out.iterdir()) if file.is_file()},
    )
    data = recipe.data
    return Manifest(
        format=FORMAT,
        tokenizer=made_by,
        sequence_tokens=data.sequence_tokens,
        corpus=data.corpus,
        corpus_bytes=data.corpus_bytes if data.corpus else None,
        domains=records,
        preparation_sha256=preparation_digest(recipe),
    )


def _splits(
    job: PreparationJob,
    domain: str,
    tokenised: list[tuple[Portion, Result]],
    shards: dict[tuple[str, str], list[tuple[ShardTask, Result]]],
) -> dict[str, SplitRecord]:
    folder = job.out / domain
    folder.mkdir(exist_ok=True)
    is_joined = any(portion.files for portion, _ in tokenised)
    return {
        split: _split_record(
            job,
            folder / split,
            [result[split] for _, result in tokenised],
            shards.get((domain, split), []),
            is_joined=is_joined,
        )
        for split in SPLITS
    }


def _domain_record(
    job: PreparationJob,
    chunks: list[Chunk],
    decision: Decision,
    cleaned: list[Result],
    domain: str,
    places: dict[int, list[int]],
    tokenised: tuple[list[Path], dict[str, SplitRecord]],
) -> DomainRecord:
    """Returns a domain's record.

    ``places``: its chunks, by source; ``tokenised``: its lists of documents, and its splits.
    """
    at = sorted(itertools.chain.from_iterable(places.values()))
    numbers = [chunks[n].number for n in at]
    folder = job.out / domain
    listing = _join(folder / DOCUMENTS_FILE, tokenised[0])
    lists = [job.file(stage, n, "rejected.jsonl") for stage in (CLEAN, DECIDE) for n in numbers]
    rejected = _join(folder / REJECTED_FILE, lists)
    reasons: Counter[str] = sum((Counter(cleaned[n]["rejected"]) + decision.copies[n] for n in at), Counter())
    sources = [source for source in job.sources if source.domain == domain]
    scores = {n: job.file(CLEAN, n, SCORES_FILE) for n in numbers}
    scores_sha256, personal = join_scores(job, scores, folder / SCORES_FILE)
    return DomainRecord(
        source=without_secrets("; ".join(dict.fromkeys(source.origin for source in sources))),
        licence="; ".join(dict.fromkeys(source.licence for source in sources)),
        transformation=_transformation(job, sources),
        documents_sha256=listing,
        splits=tokenised[1],
        datasets=[
            DatasetRecord(it.dataset, it.version, without_secrets(it.origin), it.licence) for it in sources
        ],
        rejected=dict(sorted(reasons.items())),
        rejected_sha256=rejected,
        rejected_bytes=sum(cleaned[n]["rejected_bytes"] + decision.copied_bytes[n] for n in at),
        losses=losses_of(job, chunks, cleaned, decision, places),
        scores_sha256=scores_sha256,
        personal_data=personal,
    )


def _split_record(
    job: PreparationJob,
    folder: Path,
    encoded: list[dict[str, int]],
    written: list[tuple[ShardTask, Result]],
    *,
    is_joined: bool,
) -> SplitRecord:
    folder.mkdir(exist_ok=True)
    written = [(task, result) for task, result in written if result["samples"]]
    index = index_text([result["entry"] for _, result in written])
    is_masked = job.is_masked(folder.parent.name)
    (folder / INDEX_FILE).write_text(index)
    digest = hashlib.sha256()
    counts: Any = np.zeros(1, np.int64)
    for task, _ in written:
        digest.update(job.file(WRITE, task.number, "digests").read_bytes())
        counts = counts + np.load(job.file(WRITE, task.number, "counts.npy"))
    return SplitRecord(
        documents=sum(part["documents"] for part in encoded),
        samples=sum(result["samples"] for _, result in written),
        tokens=sum(part["tokens"] for part in encoded),
        padding_tokens=sum(result["padding"] for _, result in written),
        text_bytes=sum(part["text_bytes"] for part in encoded),
        unigram_entropy=entropy(counts),
        content_sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(index.encode()).hexdigest(),
        trained_tokens=sum(result["trained"] for _, result in written) if is_masked else None,
        trained_bytes=sum(part["trained_bytes"] for part in encoded) if is_masked else None,
        files=sum(part["files"] for part in encoded) if is_joined else None,
        file_bytes=sum(part["file_bytes"] for part in encoded) if is_joined else None,
    )


def _join(path: Path, parts: list[Path]) -> str:
    """Concatenates the parts and returns the hash of the result."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def _transformation(job: PreparationJob, sources: list[Source]) -> str:
    packed = "; packed by best fit decreasing" if job.preparation.packing is Packing.best_fit else ""
    if job.spooled:
        return installed.TRANSFORMATION + packed
    steps = ["UTF-8, NFC, line ends as \\n, control characters removed"]
    for source in sources:
        if source.languages:
            steps.append(f"{source.dataset}: languages {', '.join(source.languages)}")
        if source.quality is not Quality.none:
            steps.append(f"{source.dataset}: quality heuristics for {source.quality.value}")
        if source.pii is not PersonalData.off:
            treated = "replaced" if source.pii is PersonalData.replace else "counted"
            steps.append(f"{source.dataset}: personal data {treated}")
        if source.thresholds:
            bounds = (f"{it.score} {_words_of(it)}" for it in source.thresholds)
            steps.append(f"{source.dataset}: {', '.join(bounds)}")
        if source.repositories:
            order = source.repositories.order.value
            steps.append(f"{source.dataset}: files of a repository joined, in the order of {order}")
        if source.licences:
            steps.append(f"{source.dataset}: licences {', '.join(source.licences)}")
    preparation: Preparation = job.preparation
    if any(source.kind in CONVERSATIONS for source in sources):
        steps[0] = "UTF-8, NFC, line ends as \\n, control characters removed; a loss on responses only"
    steps.append("exact duplicates removed")
    if preparation.near_duplicates is not None:
        steps.append(f"near-duplicates from Jaccard similarity {preparation.near_duplicates} on removed")
    if job.evaluation_files:
        steps.append(f"documents sharing {preparation.evaluation_ngram}-grams with evaluation tasks removed")
    if job.evaluation_files and preparation.evaluation_share is not None:
        what = f"documents with {preparation.evaluation_share:g} of an evaluation item's four-word sequences"
        steps.append(f"{what} removed")
    return "; ".join([*steps, "near-identical documents on one side of the split"]) + packed


def _words_of(threshold: Threshold) -> str:
    bounds = {"at least": threshold.at_least, "at most": threshold.at_most}
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
