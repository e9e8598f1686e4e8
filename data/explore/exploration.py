"""Explores shards: samples documents, measures them, and maps them. Start reading at `explore`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.explore.clusters import DocumentMap, map_documents
from data.explore.measure import DomainMeasures, Measures, measure_documents, measure_domains
from data.explore.sample import Document, Shards, draw_documents, draw_lines
from data.explore.scores import ScoredDomain, read_scores
from data.shards.manifest import REJECTED_FILE, SCORES_FILE
from train.recipe.errors import UserError
from train.record.tables import text_table

DOCUMENTS = 1500
"""Default number of documents to draw, for a page of some 2 MB."""
SEED = 0
SHOWN_COPIES = 12
"""Removed copies shown per domain."""
COPIES = ("exact duplicate", "near duplicate")


@dataclass(frozen=True)
class Exploration:
    """The results of exploring shards."""

    shards: Shards
    documents: list[Document]
    measures: Measures
    domains: dict[str, DomainMeasures]
    map: DocumentMap
    removed_copies: dict[str, list[dict[str, str]]]
    """For each domain, some of the copies that preparation removed, with the document that was kept."""
    scores: dict[str, ScoredDomain]
    """Of the domains whose documents have scores."""

    def to_json(self) -> str:
        """Returns the figures of domains and clusters, without the documents."""
        tree = {
            "shards": str(self.shards.root),
            "digest": self.shards.manifest.digest,
            "domains": {
                name: {
                    "splits": {side: asdict(split) for side, split in record.splits.items()},
                    "left_out": record.rejected,
                    "sampled": asdict(self.domains[name]) if name in self.domains else None,
                }
                for name, record in self.shards.domains.items()
            },
            "clusters": self.map.labels,
        }
        return json.dumps(tree, indent=1) + "\n"


def explore(place: Path, count: int = DOCUMENTS, progress: bool = False) -> Exploration:
    """Explores a folder of shards.

    Args:
        place: the folder of a mixture's shards, of one of its domains, or of a run.
        count: documents to draw, equally many from each domain.
        progress: show a progress bar.

    Raises:
        UserError: if there are no shards, or a shard that is needed is missing or altered.
    """
    shards = Shards.open(place)
    if count < len(shards.domains):
        remedy = f"give {len(shards.domains)} or more, one for each domain"
        raise UserError(f"is {count}", key="--sample", remedy=remedy)
    tokenizer = shards.open_tokenizer()
    share = count // len(shards.domains)
    documents: list[Document] = []
    for domain in tqdm(shards.domains, "drawing documents", disable=not progress, unit="domain"):
        documents += draw_documents(shards, domain, share, SEED)
    if not documents:
        raise UserError(f"{shards.root} holds no documents", remedy="give another folder")
    measures = measure_documents(documents, tokenizer)
    return Exploration(
        shards,
        documents,
        measures,
        measure_domains(documents, measures, tokenizer),
        map_documents(measures.texts, SEED),
        {domain: _removed_copies(shards, domain) for domain in shards.domains},
        {
            domain: read_scores(shards.file(domain, SCORES_FILE))
            for domain, record in shards.domains.items()
            if record.scores_sha256 is not None
        },
    )


def describe(found: Exploration) -> str:
    """Describes the domains as a text table."""
    rows = []
    for name, domain in found.domains.items():
        languages: list[Any] = list(domain.languages.items())[:4]
        shares = (f"{language} {count / domain.documents:.0%}" for language, count in languages)
        rows.append(
            (
                name,
                f"{found.shards.documents(name):,}",
                f"{domain.length_percentiles['50']:,}",
                f"{domain.cut / max(domain.documents, 1):.0%}",
                f"{domain.tokens_with_loss / max(domain.tokens, 1):.0%}",
                f"{domain.exact_copies + domain.near_copies:,}",
                f"{domain.tokens_seen_once:,}",
                ", ".join(shares),
            )
        )
    heads = ("domain", "documents", "median length", "cut", "with a loss", "copies", "seen once", "languages")
    return f"{len(found.documents):,} documents drawn\n{text_table(heads, rows, '<>>>>>><')}"


def _removed_copies(shards: Shards, domain: str) -> list[dict[str, str]]:
    record = shards.domains[domain]
    if not any(record.rejected.get(reason) for reason in COPIES):
        return []
    # Other rejected documents are drawn too and dropped, so that the list is read only once.
    every = sum(record.rejected.values())
    share = sum(record.rejected.get(reason, 0) for reason in COPIES) / every
    lines = draw_lines(shards.file(domain, REJECTED_FILE), int(4 * SHOWN_COPIES / share), SEED)
    return [line for line in lines if line["reason"] in COPIES][:SHOWN_COPIES]
