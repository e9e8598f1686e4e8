"""The schema's part for data preparation: sources, filters, duplicates.

Read only by ``data.write_shards``; the manifest of the shards holds a digest of it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from train.recipe.keys import key


class SourceKind(str, Enum):
    """File format of a source."""

    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"
    hf = "hf"
    instructions = "instructions"
    chat = "chat"
    mds = "mds"
    megatron = "megatron"


class TokenRows(str, Enum):
    """Documents in rows of token ids."""

    documents = "documents"
    stream = "stream"


CONVERSATIONS = (SourceKind.instructions, SourceKind.chat)
"""Kinds of which only some tokens are trained."""


class Quality(str, Enum):
    """Quality heuristics that a source's documents must satisfy."""

    none = "none"
    prose = "prose"
    code = "code"


class ScoreGroup(str, Enum):
    """Groups of scores that are computed together."""

    language = "language"
    prose = "prose"
    code = "code"
    classifier = "classifier"
    personal = "personal"


class PersonalData(Enum):
    """Treatments of personal data in texts."""

    off = "off"
    count = "count"
    replace = "replace"


class Packing(str, Enum):
    """Ways to lay documents into sequences."""

    concatenate = "concatenate"
    best_fit = "best_fit"


class FileOrder(str, Enum):
    """Orders of the files of a repository."""

    path = "path"
    dependencies = "dependencies"
    source = "source"


@dataclass(frozen=True)
class Repositories:
    """Repositories of a source's files, which are joined into documents once they are filtered."""

    column: Optional[str] = None
    """Column or key of the name of a record's repository. A record without one stays a document."""
    folders: Optional[int] = key(None, at_least=1, remedy="set it to at least 1")
    """Of a `text` source: the first so many folders of a file's name are its repository's."""
    path_column: Optional[str] = None
    """Column or key of the file's path within its repository; a `text` source has it."""
    order: FileOrder = FileOrder.path
    """Of a repository's files: by `path`; by `dependencies`, a file after those that it imports (Guo et al.
    2024, DeepSeek-Coder, section 2.2); or of the `source`, as its records come."""
    heading: str = ""
    """A line before each file, in which `{path}` is its path, such as `# {path}`; empty: none."""


@dataclass(frozen=True)
class Threshold:
    """Bounds of a score of documents."""

    score: str = key()
    """Name of a score, as in `scores.parquet` and docs/data.md."""
    at_least: Optional[float] = None
    """Documents with a lower score are removed."""
    at_most: Optional[float] = None
    """Documents with a higher score are removed."""


@dataclass(frozen=True)
class Source:
    """Files of one dataset that go into one domain."""

    domain: str = key()
    """Domain of the documents; several sources may share one."""
    kind: SourceKind = key()
    """`jsonl` (one object per line; also .gz and .zst), `parquet`, `text` (each file is a document) or `hf`
    (folder of a Hugging Face dataset: the output of `save_to_disk`, or parquet or JSONL files; of
    several splits, `train`). For instruction tuning, JSONL of which only the answers are trained:
    `instructions` (keys `prompt` and `response` or `completion`) or `chat` (`messages`, a list of objects
    with `role` and `content`, rendered by the tokenizer's chat template). `mds`: shards of Streaming, with
    text or token ids. `megatron`: `.bin` files with their `.idx`, which hold token ids."""
    path: str = key(in_shards_digest=False, is_path=True)
    """File, folder or pattern with * and ?; or an address that Streaming reads: s3://, dbfs:/Volumes/..."""
    text_column: str = "text"
    """Column or key of the text, or with `tokenizer` of token ids; `data.text` also means `text` within
    `data`. `text`, `instructions`, `chat` and `megatron` sources have none."""
    tokenizer: Optional[str] = key(
        None, is_path=True, in_shards_digest=False, omitted_from_digest_at_default=True
    )
    """The tokenizer that made the source's token ids, by which they become text again: `cl100k_base`, a
    Hugging Face folder, a `tokenizer.json` or a SentencePiece model. null: the source has text."""
    token_rows: TokenRows = key(TokenRows.documents, omitted_from_digest_at_default=True)
    """Rows of token ids: `documents`, one or several whole ones, or `stream`, sequences cut from documents
    end to end, which are joined again within a file."""
    quality: Quality = Quality.none
    """`prose`: Rae et al. 2021 (Gopher), section A.1.1; `code`: Chen et al. 2021, 3.1. `none`: all."""
    languages: list[str] = key(factory=list)
    """ISO 639 codes of the languages to keep, as py3langid tells them; empty: all."""
    scores: list[ScoreGroup] = key(factory=list, in_shards_digest=False)
    """Scores to compute besides those that the source's filters read: `language`, `prose`, `code`,
    `classifier`; `personal` with `pii`. They are kept in `scores.parquet`."""
    thresholds: list[Threshold] = key(factory=list, omitted_from_digest_at_default=True)
    """Bounds of scores. One that `quality` bounds too has these bounds in place of the published ones."""
    classifier: Optional[str] = key(None, is_path=True, in_shards_digest=False)
    """A fastText model (.bin or .ftz), whose probability of `classifier_label` is the score `classifier`.
    Needs the package fasttext-predict."""
    classifier_label: str = key("__label__hq", omitted_from_digest_at_default=True)
    """Label of the model."""
    pii: PersonalData = key(PersonalData.off, omitted_from_digest_at_default=True)
    """E-mail addresses, telephone numbers, IP addresses, card numbers and IBANs in texts: `count` them, which
    are then scores of the group `personal`, or `replace` them, also counted; `off`: look for none."""
    licence_column: Optional[str] = key(None, omitted_from_digest_at_default=True)
    """Column or key of a record's licence: an SPDX expression, or a list of licences that all hold."""
    licences: list[str] = key(factory=list, omitted_from_digest_at_default=True)
    """SPDX identifiers of the licences to keep, of `licence_column` or `licence_files`; empty: all."""
    licence_files: bool = key(False, omitted_from_digest_at_default=True)
    """Reads the licence of each file of a `text` source: an `SPDX-License-Identifier` in it, or else LICENSE,
    COPYING or Debian's copyright file in the nearest folder above it."""
    repositories: Optional[Repositories] = key(None, omitted_from_digest_at_default=True)
    """Joins the files of a repository into documents of up to `max_document_bytes`; null: each is one."""
    dataset: str = key()
    """Name of the dataset, for the manifest and MLflow."""
    version: str = key()
    """Version, revision or date of the dataset."""
    origin: str = key()
    """Place of publication: an address or a citation."""
    licence: str = key()
    """SPDX identifier or a sentence."""


@dataclass(frozen=True)
class Preparation:
    """Filtering of the documents of `data.sources` before tokenization, and packing of any after it."""

    near_duplicates: Optional[float] = key(
        0.8, at_least=0.5, at_most=1, remedy="give a Jaccard similarity from 0.5 to 1"
    )
    """Documents whose sets of five-word sequences have at least this Jaccard similarity are duplicates, of
    which the first is kept (Lee et al. 2022, section 4.2). null: only exact copies are removed."""
    evaluation_texts: list[str] = key(factory=list, in_shards_digest=False, is_path=True)
    """Evaluation task files (.jsonl, .json, .txt, .csv, .tsv, also .gz and .zst; .parquet, .arrow), folders
    or patterns: documents that share an n-gram with their text are removed."""
    evaluation_ngram: int = key(13, at_least=8, remedy="set it to at least 8")
    """Length of these n-grams in words (Brown et al. 2020, appendix C: 13); shorter texts of at least 8 words
    are matched as a whole."""
    evaluation_share: Optional[float] = key(
        None, above=0, at_most=1, remedy="give a share, for example 0.3", omitted_from_digest_at_default=True
    )
    """Also remove documents with this share of the four-word sequences of a text of at least 20 words, close
    together, whatever its numbers: items with numbered lines, or with one word in ten replaced. null: no."""
    signatures: Optional[str] = key(None, is_path=True, in_shards_digest=False)
    """Folder that keeps the signatures of all parts of a corpus: documents are also held to the parts before
    theirs, and added once their shards are complete. null: copies are found within the sources."""
    validation_tokens: int = key(10_000_000, above=0, omitted_from_digest_at_default=True)
    """Tokens of each domain to hold out for validation, of four bytes of text each; of a small domain, at
    most `validation_share` of its documents."""
    validation_share: float = key(
        0.03,
        above=0,
        at_most=0.5,
        remedy="give a share above 0 and at most 0.5",
        omitted_from_digest_at_default=True,
    )
    """Largest share of a domain's documents to hold out. Whole groups of near-identical documents are."""
    packing: Packing = key(Packing.concatenate, omitted_from_digest_at_default=True)
    """`concatenate`: end to end, cut where a sequence ends. `best_fit`: no document that fits into a sequence
    is cut (best fit decreasing over the documents of a shard, Ding et al. 2024); sequences are padded."""
    keep_cleaned: bool = key(False, in_shards_digest=False)
    """Keeps all documents that could be read, with all scores and signatures, in the work folder next to
    the shards: other filters and another packing need no cleaning again. It takes the text's disk space."""
    max_document_bytes: int = key(10_000_000, at_least=1, remedy="set it to at least 1")
    """Larger documents are rejected: most of them are not text documents."""
    chunk_bytes: int = key(8_000_000, at_least=1, remedy="set it to at least 1", in_shards_digest=False)
    """Input per task; row groups, record batches and compressed files are never split."""
    zstd_level: Optional[int] = key(
        None, at_least=1, at_most=22, remedy="give a level from 1 to 22", in_shards_digest=False
    )
    """Zstandard level (1 to 22) at which each shard is also compressed; `--upload` then sends the compressed
    shards, which nodes decompress after fetching. null: shards are sent uncompressed."""
