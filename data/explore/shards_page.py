"""The results of exploring shards as one self-contained page, with a map and a search of documents."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from data.explore.exploration import COPIES, Exploration
from data.explore.measure import PERCENTILES
from data.explore.scores import ScoredDomain
from train.recipe.errors import UserError
from train.recipe.units import short_number
from train.record.page.rendering import render, verbatim
from train.record.page.svg import COLOURS, draw_svg

Rows = list[list[str]]

EXCERPT_CHARACTERS = 600
"""Characters shown of each document."""
WIDE_SHARE = 0.08
"""Minimum share of a domain for a language to be named in the bar, not only in the legend."""


def write_page(found: Exploration, path: Path) -> None:
    """Writes the page.

    Raises:
        UserError: if the file can't be written.
    """
    text = shards_page(found)
    try:
        path.write_text(text)
    except OSError as error:
        what = f"{path} can't be written ({error.strerror})"
        raise UserError(what, key="--html", remedy="give another file") from None


def shards_page(found: Exploration) -> str:
    """Renders the page as HTML."""
    script = verbatim("data/explore/shards_page.js")
    reasons, left_out = _left_out(found)
    return render(
        "data/explore/shards.html.j2",
        title=f"Shards {found.shards.root.name}",
        manifest=found.shards.manifest,
        drawn=f"{len(found.documents):,}",
        key_cards=_key_cards(found),
        sizes=_sizes(found),
        has_masks=any(record.is_masked for record in found.shards.domains.values()),
        origins=[
            [name, record.facts["dataset"], record.facts["version"], record.source, record.licence]
            for name, record in found.shards.domains.items()
        ],
        reasons=reasons,
        left_out=left_out,
        copies=[[name, f"{it.exact_copies:,}", f"{it.near_copies:,}"] for name, it in found.domains.items()],
        removed_copies=[
            [name, line["place"], line["reason"], line["of"]]
            for name, lines in found.removed_copies.items()
            for line in lines
        ],
        lengths_figure=_lengths_figure(found),
        percentiles=[f"{percentile}%" for percentile in PERCENTILES],
        lengths=[
            [
                name,
                *(f"{value:,}" for value in it.length_percentiles.values()),
                f"{it.cut / max(it.documents, 1):.1%}",
            ]
            for name, it in found.domains.items()
        ],
        languages=_languages(found),
        language_colours=[(name, colour, "") for name, colour in _language_colours(found).items()],
        rarity_figure=_rarity_figure(found),
        rarity=_rarity(found),
        typical={
            name: [repr(token)[1:-1] for token in it.typical_tokens] for name, it in found.domains.items()
        },
        excerpt=EXCERPT_CHARACTERS,
        scored=[[name, f"{it.rows:,}", f"{it.kept:,}"] for name, it in found.scores.items()],
        tree=_tree(found),
        script=script,
    )


def _key_cards(found: Exploration) -> list[tuple[str, str]]:
    domains = found.shards.domains
    splits = [split for record in domains.values() for split in record.splits.values()]
    return [
        (f"{len(domains):,}", "domains"),
        (short_number(sum(split.documents for split in splits)), "documents"),
        (short_number(sum(split.tokens for split in splits)), "tokens"),
        (short_number(sum(split.text_bytes for split in splits)), "bytes of text"),
        (f"{len(found.documents):,}", "documents drawn"),
    ]


def _sizes(found: Exploration) -> Rows:
    return [
        [
            f"{name}/{side}",
            f"{split.documents:,}",
            f"{split.samples:,}",
            f"{split.tokens:,}",
            f"{(split.tokens if split.trained_tokens is None else split.trained_tokens) / split.tokens:.1%}"
            if split.tokens
            else "",
            f"{split.padding_tokens / (split.tokens + split.padding_tokens):.2%}" if split.tokens else "",
            f"{split.bytes_per_token:.2f}" if split.tokens else "",
            f"{split.unigram_entropy:.2f}",
        ]
        for name, record in found.shards.domains.items()
        for side, split in record.splits.items()
    ]


def _left_out(found: Exploration) -> tuple[list[str], Rows]:
    """The reasons for rejection, copies first, and each domain's number of rejected documents by reason."""
    records = found.shards.domains
    given = {reason for record in records.values() for reason in record.rejected}
    reasons = [reason for reason in COPIES if reason in given] + sorted(given - set(COPIES))
    rows = [
        [name, *(f"{record.rejected.get(reason, 0):,}" for reason in reasons)]
        for name, record in records.items()
    ]
    return reasons, rows


def _language_colours(found: Exploration) -> dict[str, str]:
    every = dict.fromkeys(name for it in found.domains.values() for name in it.languages)
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(every)}


def _languages(found: Exploration) -> dict[str, list[dict[str, Any]]]:
    """The parts of each domain's bar."""
    colours = _language_colours(found)
    return {
        name: [
            {
                "language": language,
                "count": count,
                "exactly": f"{count / it.documents:.1%}",
                "roughly": f"{count / it.documents:.0%}",
                "is_wide": count >= WIDE_SHARE * it.documents,
                "colour": colours[language],
            }
            for language, count in it.languages.items()
        ]
        for name, it in found.domains.items()
    }


def _rarity(found: Exploration) -> Rows:
    vocabulary = found.shards.manifest.tokenizer.vocab_size
    return [
        [
            name,
            f"{it.tokens:,}",
            f"{it.distinct_tokens:,}",
            f"{it.distinct_tokens / vocabulary:.0%}",
            f"{it.tokens_seen_once:,}",
            f"{it.mean_surprisal:.2f}",
        ]
        for name, it in found.domains.items()
    ]


def _lengths_figure(found: Exploration) -> Markup:
    lengths = {
        name: np.array([max(it.tokens.size, 1) for it in found.documents if it.domain == name])
        for name in found.domains
    }
    top = max(int(it.max()) for it in lengths.values())
    bins = 2.0 ** np.arange(0, np.log2(top) + 1.5, 0.5)
    return _histogram("Lengths of documents", lengths, bins, "tokens of a document", is_log=True)


def _rarity_figure(found: Exploration) -> Markup:
    values = found.measures.surprisal
    by_domain = {
        name: np.array([s for s, it in zip(values, found.documents, strict=True) if it.domain == name])
        for name in found.domains
    }
    bins = np.linspace(values.min(), values.max() + 1e-6, 41)
    return _histogram("Rarity of tokens", by_domain, bins, "nats per token", is_log=False)


def _histogram(
    title: str, values: dict[str, np.ndarray[Any, Any]], bins: np.ndarray[Any, Any], label: str, is_log: bool
) -> Markup:
    def draw(axes: Sequence[Any]) -> None:
        for n, (name, mine) in enumerate(values.items()):
            shares = np.full(mine.size, 100 / max(mine.size, 1))
            colour = COLOURS[n % len(COLOURS)]
            axes[0].hist(mine, bins, weights=shares, histtype="step", color=colour, label=name, linewidth=1.6)
        if is_log:
            axes[0].set_xscale("log", base=2)
            axes[0].xaxis.set_major_formatter("{x:,.0f}")
        axes[0].set_ylabel("% of documents")
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)

    return draw_svg(title, draw, heights=(2.8,), bottom=label)


def _parts(text: str, trained: Sequence[tuple[int, int]] | None) -> list[tuple[str, bool]] | None:
    """Cuts a text where its loss begins and ends: pieces, and whether they have one; None: all of it has."""
    if trained is None:
        return None
    borders = [0, *(border for span in trained for border in span), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    return [(piece, n % 2 == 1) for n, piece in enumerate(pieces) if piece]


def _tree(found: Exploration) -> dict[str, Any]:
    """The data for the page's script."""
    clusters = [f"{n + 1}: {label}" for n, label in enumerate(found.map.labels)]
    documents = []
    for n, document in enumerate(found.documents):
        text, copy_of = found.measures.texts[n], int(found.measures.copy_of[n])
        x, y = found.map.places[n]
        documents.append(
            {
                "name": document.name,
                "domain": document.domain,
                "split": document.split,
                "tokens": int(document.tokens.size),
                "language": found.measures.languages[n],
                "cluster": clusters[found.map.cluster[n]],
                "surprisal": round(float(found.measures.surprisal[n]), 3),
                "copy_of": copy_of if copy_of != n else None,
                "x": round(float(x), 4),
                "y": round(float(y), 4),
                "text": text[:EXCERPT_CHARACTERS],
                "is_cut": len(text) > EXCERPT_CHARACTERS,
                "parts": _parts(text[:EXCERPT_CHARACTERS], found.measures.trained[n]),
            }
        )
    labels = []
    for number, label in enumerate(found.map.labels):
        mine = found.map.places[found.map.cluster == number]
        x, y = np.median(mine, axis=0) if len(mine) else (0.5, 0.5)
        labels.append({"label": label, "x": round(float(x), 4), "y": round(float(y), 4)})
    values = {
        "domain": list(found.domains),
        "cluster": clusters,
        "language": list(dict.fromkeys(language for language in found.measures.languages)),
    }
    scores = {name: _score_tree(domain) for name, domain in found.scores.items()}
    return {"documents": documents, "labels": labels, "values": values, "scores": scores}


def _score_tree(domain: ScoredDomain) -> dict[str, Any]:
    """A domain's scores for the page's script; five digits suffice to draw and to choose."""
    scores = {name: asdict(it) for name, it in domain.scores.items()}
    sample = [
        {
            name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in document.items()
        }
        for document in domain.sample
    ]
    for score in scores.values():
        for name in ("at", "edges"):
            score[name] = [float(f"{value:.9g}") for value in score[name]]
    return {"rows": domain.rows, "kept": domain.kept, "scores": scores, "sample": sample}
