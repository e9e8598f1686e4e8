"""The part of a recipe's schema that says how text becomes shards: sources, filters, duplicates.

Read by ``data.write_shards`` alone; the manifest beside the shards holds a digest of it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.keys import key


class SourceKind(str, Enum):
    """Form of a source's files."""

    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"
    hf = "hf"


class Quality(str, Enum):
    """Which heuristics of quality a source's documents must satisfy."""

    none = "none"
    prose = "prose"
    code = "code"


@dataclass(frozen=True)
class Source:
    """Files of one dataset that go into one domain."""

    domain: str = key()
    """Domain that the documents belong to; several sources may share one."""
    kind: SourceKind = key()
    """`jsonl` (one object a line; .gz and .zst are read too), `parquet`, `text` (each file is a document) or
    `hf` (folder of a Hugging Face dataset: what `save_to_disk` writes, or parquet or JSONL files)."""
    path: str = key(in_shards_digest=False)
    """File, folder or pattern with * and ?; or an address that Streaming reads: s3://, dbfs:/Volumes/..."""
    text_column: str = "text"
    """Column or key that holds the text; `text` sources have none."""
    quality: Quality = Quality.none
    """`prose`: Rae et al. 2021 (Gopher), section A.1.1; `code`: Chen et al. 2021, 3.1. `none`: all."""
    languages: list[str] = key(factory=list)
    """ISO 639-1 codes of the languages to keep, found by function words and script; empty: all."""
    dataset: str = key()
    """Name of the dataset, for the manifest and MLflow."""
    version: str = key()
    """Its version, revision or date."""
    origin: str = key()
    """Where it was published: an address or a citation."""
    licence: str = key()
    """SPDX identifier or a sentence."""


@dataclass(frozen=True)
class Preparation:
    """What is done to documents of `data.sources` before they become tokens."""

    near_duplicates: Optional[float] = key(
        0.8, at_least=0.5, at_most=1, remedy="give a Jaccard similarity from 0.5 to 1"
    )
    """Documents whose sets of five-word sequences have at least this Jaccard similarity count as one, and the
    first is kept (Lee et al. 2022, section 4.2). null: exact copies alone are removed."""
    evaluation_texts: list[str] = key(factory=list, in_shards_digest=False)
    """Task files (.jsonl, .json, .txt), folders or patterns of them: a document that shares an n-gram with
    their text is removed."""
    evaluation_ngram: int = key(13, at_least=8, remedy="set it to at least 8")
    """Words of such an n-gram (Brown et al. 2020, appendix C: 13); shorter texts of at least 8 words count
    whole."""
    max_document_bytes: int = key(10_000_000, at_least=1, remedy="set it to at least 1")
    """Larger documents are rejected: more often than not they are no documents."""
    chunk_bytes: int = key(8_000_000, at_least=1, remedy="set it to at least 1", in_shards_digest=False)
    """Input that one task reads; a row group, record batch or compressed file is never cut."""
    zstd_level: Optional[int] = key(
        None, at_least=1, at_most=22, remedy="give a level from 1 to 22", in_shards_digest=False
    )
    """Each shard is compressed too, at this level of Zstandard (1 to 22), and `--upload` sends that in its
    place: less to store and to fetch. Nodes unpack what they fetch. null: shards are sent as they are."""
