"""Builds a recipe's shards from its documents, stage by stage. Start reading at `build_into`."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.chat_template import read_template
from data.shards.manifest import (
    Manifest,
    require_rows,
)
from data.text import installed
from data.text.bpe import train_bpe
from data.text.clean import SCORE, clean, keeps_cleaned, read_documents, score_all, write_texts
from data.text.conversations import ChatFormat, chat_format
from data.text.decide import STAGE as DECIDE
from data.text.decide import TRAIN, Decision, decide, store_signatures
from data.text.engines import Engine
from data.text.evaluation_overlap import list_evaluation_files
from data.text.inputs import (
    WHOLE,
    Chunk,
    SourceFile,
    cut,
    list_inputs,
)
from data.text.installed import CorpusDocument
from data.text.job import PreparationJob, Result
from data.text.losses import require_readable_sources, table_of_languages
from data.text.records import assemble
from data.text.remote_inputs import FOLDER as FETCHED
from data.text.remote_inputs import fetch_sources
from data.text.repositories import join_repositories, require_repositories
from data.text.signature_store import earlier_parts
from data.text.source_keys import check_preparation, check_sources
from data.text.tokens import encode, plan_shards, write_shard
from data.tokenizer import CHAT_TEMPLATE, TokenizerHandle, find_sentinels, open_given, open_tokenizer
from train.recipe.errors import UserError
from train.recipe.phases import domains_of, fills_in_middle
from train.recipe.preparation import (
    Source,
    SourceKind,
    TokenRows,
)
from train.recipe.reading import to_dict
from train.recipe.schema import Recipe, TokenizerKind
from train.record import log
from train.record.files import sha256

logger = log.get_logger(__name__)

VERSION = 8
"""Version of the stages: raise it when their output changes, so that no job continues from older results."""
BPE_TEXT_BYTES = 16_000_000
"""Amount of text that a tokenizer is trained on; more no longer changes a small vocabulary."""
CLEANED = "cleaned.json"
"""In the work folder, all that the cleaned documents in it depend on."""
SPOOL_BYTES = 4_000_000
"""Amount of text of the installed corpus per task."""


def build_into(
    work: Path, recipe: Recipe, engine: Engine, documents: Iterator[CorpusDocument] | None
) -> Manifest:
    """Builds shards in ``work/out``.

    Args:
        work: work folder; results of the same job from an earlier call are reused.
        recipe: the recipe, with sources and preparation.
        engine: runs the tasks.
        documents: documents in place of the recipe's sources.

    Raises:
        UserError: if a source is missing, a key is invalid, or a domain has too little text.
    """
    check_preparation(recipe.data.preparation)
    given = _given_tokenizer(recipe)
    if fills_in_middle(recipe) and (given or recipe.tokenizer.kind is TokenizerKind.cl100k_base):
        find_sentinels(given or open_tokenizer(recipe.tokenizer, Path()), recipe.tokenizer)
    chat = _chat_format(recipe, given)
    job, chunks = (
        _spool(work, recipe, documents) if documents is not None else _list(work, recipe, engine, given, chat)
    )
    earlier_parts(job)  # Refuses a store of other parameters before anything is read.
    if keeps_cleaned(job):
        engine.run("reading", score_all, job, chunks)
    cleaned = engine.run("filtering" if keeps_cleaned(job) else "reading and filtering", clean, job, chunks)
    if table := table_of_languages(job, cleaned, chunks):
        logger.info(table)
    require_repositories(job, chunks, cleaned)
    decision = decide(job, chunks, cleaned, engine)
    _require_documents(recipe, job, decision, cleaned)
    require_readable_sources(job, chunks, cleaned)
    if given is not None:
        given.to_hugging_face(job.out)
    elif recipe.tokenizer.kind is TokenizerKind.bpe:
        _train_tokenizer(recipe, job, chunks, decision)
    if (template := read_template(recipe.tokenizer)) is not None:
        (job.out / CHAT_TEMPLATE).write_text(template, "utf-8")
    portions = join_repositories(job, chunks, cleaned, engine)
    encoded = engine.run("tokenising", encode, job, portions)
    tasks = plan_shards(job, portions, encoded)
    written = engine.run("writing shards", write_shard, job, tasks)
    manifest = assemble(recipe, job, chunks, decision, cleaned, (portions, encoded, tasks, written))
    store_signatures(job, cleaned, engine)
    return manifest


def _given_tokenizer(recipe: Recipe) -> TokenizerHandle | None:
    """The tokenizer that the recipe gives the path of; None if it is built in or to be trained.

    Raises:
        UserError: if it can't be read, or has more ids than the model has rows.
    """
    cfg = recipe.tokenizer
    if cfg.kind is TokenizerKind.hf and cfg.path is None:
        remedy = "name a Hugging Face folder, a tokenizer.json or a SentencePiece model"
        raise UserError("is null, so there is no tokenizer", key="tokenizer.path", remedy=remedy)
    if cfg.path is None:
        return None
    handle = open_given(cfg)
    require_rows(recipe, handle.vocab_size)
    return handle


def _chat_format(recipe: Recipe, given: TokenizerHandle | None) -> ChatFormat | None:
    """All that renders the recipe's chats; None if it has none.

    Raises:
        UserError: if there is no template, or it is no Jinja.
    """
    if all(source.kind is not SourceKind.chat for source in recipe.data.sources):
        return None
    is_built_in = recipe.tokenizer.kind is TokenizerKind.cl100k_base
    return chat_format(recipe.tokenizer, open_tokenizer(recipe.tokenizer, Path()) if is_built_in else given)


def _list(
    work: Path, recipe: Recipe, engine: Engine, given: TokenizerHandle | None, chat: ChatFormat | None
) -> tuple[PreparationJob, list[Chunk]]:
    """Builds the job of the recipe's sources; removes results of another job from the work folder."""
    check_sources(recipe)
    data = recipe.data
    evaluation = list_evaluation_files(data.preparation.evaluation_texts)
    job = replace(_job(work, recipe, data.sources, evaluation), chat=chat)
    fetched = fetch_sources(job, engine)
    inputs = [list_inputs(n, source, fetched.get(n)) for n, source in enumerate(data.sources)]
    texts = [[file, sha256(Path(file))] for file in evaluation]
    files = [[asdict(file) for file in of] for of in inputs]
    section = to_dict(recipe)
    tree = [
        VERSION,
        section["data"]["sources"],
        section["data"]["preparation"],
        section["tokenizer"],
        given and given.fingerprint,
        chat and chat.template,
        texts,
        files,
    ]
    mark = json.dumps([*tree, recipe.data.sequence_tokens], sort_keys=True)
    cleaning = json.dumps([VERSION, *map(_cleaning_keys, data.sources), *_cleaning_facts(job), texts, files])
    record, before = work / "job.json", work / CLEANED
    is_cleaned = keeps_cleaned(job) and before.is_file() and before.read_text() == cleaning
    if record.is_file() and record.read_text() == mark:
        logger.info(f"continuing the job in {work}")
    else:
        if is_cleaned:
            logger.info(f"choosing from the cleaned documents in {work}")
        kept = {FETCHED, SCORE} if is_cleaned else {FETCHED}
        for place in work.iterdir():
            if place.is_dir() and place.name not in kept:
                shutil.rmtree(place)
        record.write_text(mark)
        before.write_text(cleaning)
    streams = [n for n, source in enumerate(data.sources) if source.token_rows is TokenRows.stream]
    kinds = [source.kind for source in data.sources]
    return job, cut(inputs, kinds, data.preparation.chunk_bytes, whole=streams)


def _cleaning_keys(source: Source) -> dict[str, Any]:
    """The keys of a source on which its cleaned documents and their scores depend."""
    tree = asdict(source)
    for name in (
        *("domain", "version", "origin", "licence"),
        *("quality", "languages", "licences", "thresholds", "scores"),
    ):
        del tree[name]
    of = source.repositories
    return tree | {
        "repositories": of and [of.column, of.folders, of.path_column],
        "kind": source.kind.value,
        "pii": source.pii.value,
        "token_rows": source.token_rows.value,
    }


def _cleaning_facts(job: PreparationJob) -> list[Any]:
    """Returns the numbers, classifiers (by digest) and chat template that cleaned documents depend on."""
    preparation = job.preparation
    models = [[it.classifier, sha256(Path(it.classifier))] for it in job.sources if it.classifier]
    chat = job.chat and job.chat.template
    numbers = [
        *(preparation.evaluation_ngram, preparation.evaluation_share),
        *(preparation.max_document_bytes, preparation.chunk_bytes),
    ]
    return [numbers, models, chat]


def remove_finished(work: Path, *, keeps: bool) -> None:
    """Removes a work folder when its shards are in place, but for cleaned documents that are to be kept."""
    if not keeps:
        shutil.rmtree(work, ignore_errors=True)
        return
    for place in work.iterdir():
        if place.name not in (FETCHED, SCORE, CLEANED):
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def _spool(
    work: Path, recipe: Recipe, documents: Iterator[CorpusDocument]
) -> tuple[PreparationJob, list[Chunk]]:
    """Builds the job of given documents, and writes them to files that tasks can read."""
    by_domain: dict[str, list[list[tuple[str, str]]]] = {}
    sizes: Counter[str] = Counter()
    with tqdm(desc="reading text", unit="B", unit_scale=True, mininterval=1) as bar:
        for document in documents:
            chunks = by_domain.setdefault(document.domain, [[]])
            if sizes[document.domain] > SPOOL_BYTES * len(chunks):
                chunks.append([])
            chunks[-1].append((document.name, document.text))
            sizes[document.domain] += len(document.text)
            bar.update(len(document.text))
    made: list[Chunk] = []
    for n, texts in enumerate(by_domain.values()):
        for part in texts:
            path = work / "spool" / f"{len(made):06}.texts.jsonl"
            write_texts(path, part)
            made.append(Chunk(len(made), n, (SourceFile(n, path.name, str(path), 0, 0),), 0, WHOLE))
    sources = [
        Source(
            domain=domain,
            kind=SourceKind.hf,
            path="",
            dataset=recipe.data.corpus or "documents",
            version="",
            origin=installed.MESSAGES_SOURCE if domain == installed.MESSAGES else installed.SOURCE,
            licence=installed.LICENCE,
        )
        for domain in by_domain
    ]
    return _job(work, recipe, sources, ()), made


def _job(work: Path, recipe: Recipe, sources: list[Source], evaluation: tuple[str, ...]) -> PreparationJob:
    data = recipe.data
    (work / "out").mkdir(parents=True, exist_ok=True)
    spooled = not data.sources
    # Tasks read the copy of the tokenizer that is written with the shards.
    tokenizer = replace(recipe.tokenizer, path=None)
    return PreparationJob(
        work, tuple(sources), data.preparation, evaluation, tokenizer, data.sequence_tokens, spooled
    )


def _require_documents(
    recipe: Recipe, job: PreparationJob, decision: Decision, cleaned: list[Result]
) -> None:
    for domain in [*domains_of(recipe), *recipe.data.validation_domains]:
        count = decision.documents.get(domain, 0)
        if count < 2:
            lost = sum((Counter(result["rejected"]) for result in cleaned), sum(decision.copies, Counter()))
            why = f" ({', '.join(f'{n} {reason}' for reason, n in lost.most_common(4))})" if lost else ""
            what = f"{domain} has {count} documents, too few for two splits{why}"
            remedy = "raise data.corpus_bytes" if job.spooled else "correct data.sources or their filters"
            raise UserError(what, key="data.domains", remedy=remedy)


def _train_tokenizer(recipe: Recipe, job: PreparationJob, chunks: list[Chunk], decision: Decision) -> None:
    """Trains a BPE on every n-th document, and writes it where the tasks expect it."""
    stride = -(-decision.train_bytes // BPE_TEXT_BYTES)
    logger.info(f"training a tokenizer of {recipe.tokenizer.vocab_size} tokens")

    def texts() -> Iterator[str]:
        seen = 0
        for chunk in chunks:
            fate = np.load(job.file(DECIDE, chunk.number, "npy"))
            for (_, text), side in zip(read_documents(job, chunk.number), fate, strict=True):
                if side == TRAIN:
                    if seen % max(stride, 1) == 0:
                        yield text
                    seen += 1

    train_bpe(recipe.tokenizer, texts()).to_hugging_face(job.out)
