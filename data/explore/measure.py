"""Measurements of a sample of documents: languages, copies, rarity of tokens, lengths."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.explore.sample import Document
from data.text.duplicates import SKETCH, Resolution, resolve, sketch
from data.text.language import language_of
from data.text.words import hash_words
from data.tokenizer import TokenizerHandle

# N documents, V vocabulary.

NEAR = 0.8
"""Minimum Jaccard similarity of near-copies."""
TYPICAL = 12
PRIOR_TOKENS = 1000.0
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Measures:
    """The measurements of each document [N]."""

    texts: list[str]
    languages: list[str]
    surprisal: NDArray[np.float64]
    """Nats per token under the token frequencies of the other documents: high for unusual documents."""
    copy_of: NDArray[np.int64]
    """The first equal or nearly equal document of the sample; its own number if there is none."""
    is_exact: NDArray[np.bool_]
    trained: list[list[tuple[int, int]] | None]
    """Characters whose tokens have a loss, from and to; None: all."""


@dataclass(frozen=True)
class DomainMeasures:
    """The measurements of a domain's documents."""

    documents: int
    tokens: int
    length_percentiles: dict[str, int]
    """Tokens per document."""
    cut: int
    """Documents that lie in more than one sequence."""
    languages: dict[str, int]
    """Documents by language, most frequent first."""
    exact_copies: int
    near_copies: int
    distinct_tokens: int
    """Number of ids that occur."""
    tokens_seen_once: int
    mean_surprisal: float
    tokens_with_loss: int
    typical_tokens: list[str]
    """Tokens that are far more frequent here than in the other domains."""


def measure_documents(documents: Sequence[Document], tokenizer: TokenizerHandle) -> Measures:
    """Measures each document by itself and against the others."""
    texts = [tokenizer.decode(document.tokens.tolist()) for document in documents]
    copies = _copies(texts)
    return Measures(
        texts,
        [language_of(text) for text in texts],
        _surprisal([document.tokens for document in documents], tokenizer.vocab_size),
        copies.keeper,
        copies.is_exact,
        [_spans(document, tokenizer) for document in documents],
    )


def _spans(document: Document, tokenizer: TokenizerHandle) -> list[tuple[int, int]] | None:
    """The characters of a document whose tokens have a loss; None: all.

    A character of several tokens belongs to the last of them.
    """
    if document.trained is None or document.trained.all():
        return None
    borders = np.flatnonzero(np.diff(document.trained.astype(np.int8), prepend=0, append=0))
    # Ids before a border that end inside a character decode to a mark in its place.
    ends = [len(tokenizer.decode(document.tokens[:border].tolist()).rstrip("\ufffd")) for border in borders]
    return list(zip(ends[::2], ends[1::2], strict=True))


def measure_domains(
    documents: Sequence[Document], measures: Measures, tokenizer: TokenizerHandle
) -> dict[str, DomainMeasures]:
    """Summarises the documents of each domain."""
    domains = list(dict.fromkeys(document.domain for document in documents))
    counts = {
        domain: sum(
            (np.bincount(d.tokens, minlength=tokenizer.vocab_size) for d in documents if d.domain == domain),
            np.zeros(tokenizer.vocab_size, np.int64),
        )
        for domain in domains
    }
    total: NDArray[np.int64] = sum(counts.values(), np.zeros(tokenizer.vocab_size, np.int64))
    is_copy_N = measures.copy_of != np.arange(len(documents))
    found = {}
    for domain in domains:
        at = np.array([n for n, document in enumerate(documents) if document.domain == domain])
        lengths = np.array([documents[n].tokens.size for n in at])
        typical = typical_ids(counts[domain], total - counts[domain])
        found[domain] = DomainMeasures(
            documents=at.size,
            tokens=int(lengths.sum()),
            length_percentiles={str(p): int(np.percentile(lengths, p)) for p in PERCENTILES},
            cut=sum(documents[n].sequences > 1 for n in at),
            languages=dict(Counter(measures.languages[n] for n in at).most_common()),
            exact_copies=int((is_copy_N & measures.is_exact)[at].sum()),
            near_copies=int((is_copy_N & ~measures.is_exact)[at].sum()),
            distinct_tokens=int((counts[domain] > 0).sum()),
            tokens_seen_once=int((counts[domain] == 1).sum()),
            mean_surprisal=float(np.average(measures.surprisal[at], weights=np.maximum(lengths, 1))),
            tokens_with_loss=sum(_with_loss(documents[n]) for n in at),
            typical_tokens=[tokenizer.decode([token]) for token in typical],
        )
    return found


def typical_ids(here_V: NDArray[np.int64], elsewhere_V: NDArray[np.int64]) -> list[int]:
    """Ranks ids by the z-score of their log-odds, with a prior of all counts (Monroe et al. 2008, section
    3.5).

    Args:
        here_V: count of each id [V] in the domain.
        elsewhere_V: its count in the other domains; if all are 0, no id is typical.
    """
    if not here_V.sum() or not elsewhere_V.sum():
        return []
    prior = (here_V + elsewhere_V) * (PRIOR_TOKENS / (here_V.sum() + elsewhere_V.sum()))

    def log_odds(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        mine = counts + prior
        odds: NDArray[np.float64] = np.log(mine / (counts.sum() + PRIOR_TOKENS - mine))
        return odds

    seen = np.flatnonzero(here_V + elsewhere_V)
    with np.errstate(divide="ignore"):
        spread = np.sqrt(1 / (here_V + prior)[seen] + 1 / (elsewhere_V + prior)[seen])
        scores = (log_odds(here_V)[seen] - log_odds(elsewhere_V)[seen]) / spread
    best = np.argsort(-scores, kind="stable")[:TYPICAL]
    return [int(seen[n]) for n in best if scores[n] > 0]


def _with_loss(document: Document) -> int:
    return document.tokens.size if document.trained is None else int(document.trained.sum())


def _surprisal(documents: Sequence[NDArray[np.int32]], vocab_size: int) -> NDArray[np.float64]:
    """Mean of -ln p over each document's tokens; p from all other documents, with add-one smoothing."""
    total = sum((np.bincount(tokens, minlength=vocab_size) for tokens in documents), np.zeros(vocab_size))
    everything = total.sum()
    means = np.zeros(len(documents))
    for n, tokens in enumerate(documents):
        if tokens.size:
            ids, counts = np.unique(tokens, return_counts=True)
            shares = (total[ids] - counts + 1) / (everything - tokens.size + vocab_size)
            means[n] = -(counts * np.log(shares)).sum() / tokens.size
    return means


def _copies(texts: list[str]) -> Resolution:
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    sketches = np.concatenate([np.empty(0, SKETCH), *(sketch(hash_words(text)) for text in texts)])
    return resolve(np.frombuffer(digests, np.uint64).reshape(-1, 2), sketches, NEAR)
