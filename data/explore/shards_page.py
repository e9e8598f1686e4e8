"""What was found in shards as one self-contained page, light and dark, with documents to search and a map."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.explore.exploration import COPIES, Exploration
from data.explore.measure import PERCENTILES
from train.recipe.errors import UserError
from train.recipe.units import short_number
from train.report.plots import COLOURS, render
from train.report.run_page import PAGE, Markup, figure, section, table

EXCERPT_CHARACTERS = 600
"""Of each document, in the page."""
STYLE = """<style>
#map circle { cursor: pointer; fill-opacity: .8; } #map circle.off { fill-opacity: .07; }
#map circle.chosen { stroke: currentColor; stroke-width: 2; }
#map { background: var(--card); border-radius: .5rem; }
#map text { font: 600 11px system-ui, sans-serif; fill: var(--ink); text-anchor: middle; pointer-events: none;
  paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
#controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .6rem 0; }
#controls input, #controls select, button { font: inherit; font-size: .85rem; color: var(--ink);
  background: var(--card); border: 1px solid var(--line); border-radius: .35rem; padding: .2rem .5rem; }
#controls input { flex: 1 1 14rem; } #controls select { max-width: 13rem; }
#key { display: flex; flex-wrap: wrap; gap: .3rem; margin: .5rem 0; }
#key i, article i { display: inline-block; width: .8em; height: .8em; border-radius: .2em;
  margin-right: .4em; }
article { border-top: 1px solid var(--line); padding: .6rem 0; } article span { color: var(--faint); }
article header { font-size: .85rem; overflow-wrap: anywhere; }
article pre { max-height: 14rem; overflow: auto; margin: .4rem 0; overflow-wrap: anywhere; }
mark { background: #facc15; color: #1c2024; }
.part { color: #fff; font-size: .75rem; padding: .2rem .4rem; overflow: hidden; white-space: nowrap; }
</style>"""
CONTROLS = """<p id="count" role="status"></p>
<div id="controls">
<input id="q" type="search" placeholder="words to search for" aria-label="words to search for">
<select id="domain" aria-label="domain"><option value="">every domain</option></select>
<select id="cluster" aria-label="cluster"><option value="">every cluster</option></select>
<select id="language" aria-label="language"><option value="">every language</option></select>
<select id="order" aria-label="order" data-usual="drawn"><option value="drawn">in the order drawn</option>
<option value="rarest">rarest tokens first</option><option value="plainest">commonest tokens first</option>
<option value="longest">longest first</option><option value="shortest">shortest first</option></select>
<select id="colour" aria-label="colour" data-usual="cluster"><option value="cluster">colour: cluster</option>
<option value="domain">colour: domain</option><option value="language">colour: language</option></select>
</div>
<svg id="map" viewBox="0 0 900 540" role="img" aria-label="Map of documents"></svg>
<div id="key"></div><div id="list"></div><button id="more">more</button>
<noscript><p>The map and the search need JavaScript; all else on this page does not.</p></noscript>"""


def write_page(found: Exploration, path: Path) -> None:
    """Writes the page.

    Raises:
        UserError: if it can't be written there.
    """
    title = f"Shards {found.shards.root.name}"
    parts = (
        _header(found),
        _sizes(found),
        _left_out(found),
        _lengths(found),
        _languages(found),
        _rarity(found),
        _documents(found),
    )
    script = Path(__file__).with_name("shards_page.js").read_text()
    # A `<` within a string of JSON can be written so; the element then ends where it should.
    tree = json.dumps(_tree(found), ensure_ascii=False).replace("<", "\\u003c")
    scripts = f'<script id="data" type="application/json">{tree}</script><script>{script}</script>'
    text = PAGE.format(title=html.escape(title), body=STYLE + "\n".join([*parts, scripts]))
    try:
        path.write_text(text)
    except OSError as error:
        what = f"{path} can't be written ({error.strerror})"
        raise UserError(what, key="--html", remedy="give another file") from None


def _header(found: Exploration) -> str:
    manifest, domains = found.shards.manifest, found.shards.domains
    splits = [split for record in domains.values() for split in record.splits.values()]
    figures = {
        "domains": f"{len(domains):,}",
        "documents": short_number(sum(split.documents for split in splits)),
        "tokens": short_number(sum(split.tokens for split in splits)),
        "bytes of text": short_number(sum(split.text_bytes for split in splits)),
        "documents drawn": f"{len(found.documents):,}",
    }
    cards = "".join(
        f"<div class=card><b>{text}</b><span>{name}</span></div>" for name, text in figures.items()
    )
    origin = (
        f"{manifest.tokenizer.name}, sequences of {manifest.sequence_tokens:,} tokens, digest "
        f"{manifest.digest[:12]}. Sizes and what was left out are of all documents; everything else is of "
        f"{len(found.documents):,} documents, drawn at random, as many from each domain."
    )
    name = html.escape(found.shards.root.name)
    return f"<h1>Shards {name}</h1><p>{html.escape(origin)}</p><div class=cards>{cards}</div>"


def _sizes(found: Exploration) -> str:
    rows = [
        [
            f"{name}/{side}",
            f"{split.documents:,}",
            f"{split.samples:,}",
            f"{split.tokens:,}",
            f"{split.bytes_per_token:.2f}" if split.tokens else "",
            f"{split.unigram_entropy:.2f}",
        ]
        for name, record in found.shards.domains.items()
        for side, split in record.splits.items()
    ]
    heads = ("split", "documents", "sequences", "tokens", "bytes per token", "entropy, nats per token")
    origins = [
        [name, record.facts["dataset"], record.facts["version"], record.source, record.licence]
        for name, record in found.shards.domains.items()
    ]
    return section(
        "Sizes", table(heads, rows) + table(("domain", "dataset", "version", "origin", "licence"), origins)
    )


def _left_out(found: Exploration) -> str:
    records = found.shards.domains
    first = [reason for reason in COPIES if any(reason in record.rejected for record in records.values())]
    others = sorted({reason for record in records.values() for reason in record.rejected} - set(COPIES))
    body = "<p>Preparation left nothing out.</p>"
    if first or others:
        rows = [
            [name, *(f"{record.rejected.get(reason, 0):,}" for reason in [*first, *others])]
            for name, record in records.items()
        ]
        body = table(["domain", *first, *others], rows)
    body += "<p>Copies that are still among the documents drawn (similarity of 0.8 and more):</p>"
    body += table(
        ("domain", "equal", "nearly equal"),
        [[name, f"{it.exact_copies:,}", f"{it.near_copies:,}"] for name, it in found.domains.items()],
    )
    copies = [
        [name, line["place"], line["reason"], line["of"]]
        for name, lines in found.removed_copies.items()
        for line in lines
    ]
    if copies:
        body += f"<p>{len(copies):,} of those that were removed:</p>"
        body += table(("domain", "removed", "reason", "stayed"), copies)
    return section("Duplicates and what was left out", body)


def _lengths(found: Exploration) -> str:
    lengths = {
        name: np.array([max(it.tokens.size, 1) for it in found.documents if it.domain == name])
        for name in found.domains
    }
    top = max(int(it.max()) for it in lengths.values())
    bins = 2.0 ** np.arange(0, np.log2(top) + 1.5, 0.5)
    svg = _histogram("Lengths of documents", lengths, bins, "tokens of a document", is_log=True)
    rows = [
        [name, *(f"{value:,}" for value in it.length_percentiles.values())]
        for name, it in found.domains.items()
    ]
    heads = ["domain", *(f"{percentile}%" for percentile in PERCENTILES)]
    return section("Lengths", figure(svg) + table(heads, rows))


def _languages(found: Exploration) -> str:
    every = list(dict.fromkeys(name for it in found.domains.values() for name in it.languages))
    rows = []
    for name, it in found.domains.items():
        parts = "".join(
            f'<div class=part title="{language} {count / it.documents:.1%}" style="flex:{count};'
            f'background:{COLOURS[every.index(language) % len(COLOURS)]}">{language} '
            f"{count / it.documents:.0%}</div>"
            for language, count in it.languages.items()
        )
        rows.append([name, Markup(f"<div class=bar>{parts}</div>")])
    note = (
        "By script and the most frequent function words, as preparation's filter does; "
        "und: short, mixed, or no prose, source code above all."
    )
    return section("Languages", f"<p>{note}</p>" + table(("domain", "documents"), rows))


def _rarity(found: Exploration) -> str:
    vocabulary = found.shards.manifest.tokenizer.vocab_size
    rows = [
        [
            name,
            f"{it.tokens:,}",
            f"{it.distinct_tokens:,}",
            f"{it.distinct_tokens / vocabulary:.0%}",
            f"{it.tokens_seen_once:,}",
            f"{it.mean_surprisal:.2f}",
            Markup(" ".join(f"<code>{html.escape(repr(token)[1:-1])}</code>" for token in it.typical_tokens)),
        ]
        for name, it in found.domains.items()
    ]
    heads = ("domain", "tokens", "different", "of all", "seen once", "nats per token", "typical of it")
    surprisal = {
        name: np.array(
            [s for s, it in zip(found.measures.surprisal, found.documents, strict=True) if it.domain == name]
        )
        for name in found.domains
    }
    values = found.measures.surprisal
    bins = np.linspace(values.min(), values.max() + 1e-6, 41)
    svg = _histogram("Rarity of tokens", surprisal, bins, "nats per token", is_log=False)
    note = (
        "A document's rarity is the mean of -ln p over its tokens, p being their frequency in the other "
        "documents drawn. Both ends deserve a look: lists and gibberish are rare, boilerplate is common."
    )
    return section("Rarity of tokens", f"<p>{note}</p>" + figure(svg) + table(heads, rows))


def _histogram(
    title: str, values: dict[str, np.ndarray[Any, Any]], bins: np.ndarray[Any, Any], label: str, is_log: bool
) -> str:
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

    return render(title, draw, heights=(2.8,), bottom=label)


def _documents(found: Exploration) -> str:
    note = (
        f"The first {EXCERPT_CHARACTERS} characters of each. A point is a document; documents that use the "
        "same words lie near each other, and a cluster is named by the words that set it apart."
    )
    return section("Documents", f"<p>{note}</p>{CONTROLS}")


def _tree(found: Exploration) -> dict[str, Any]:
    """What the page's script reads."""
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
    return {"documents": documents, "labels": labels, "values": values}
