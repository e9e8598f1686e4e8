"""The manifest of a folder of shards, `manifest.json`, and the check of the folder against it.

The manifest has the hash of each split's ``index.json``, which has the hash of each shard file, so it
covers every byte. It is written last; a folder without a manifest does not count as a folder of shards.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.index import INDEX_FILE, ShardIndex, file_mismatch, open_index
from data.tokenizer import TokenizerHandle, find_sentinels, name_of
from train.recipe.errors import UserError
from train.recipe.keys import rules_of
from train.recipe.names import unfit_as_file
from train.recipe.phases import domains_of, fill_in_middle_shares, fills_in_middle, phases_of
from train.recipe.preparation import Preparation, Source
from train.recipe.reading import to_dict
from train.recipe.schema import LossMean, Recipe, TokenizerKind

MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.jsonl"
REJECTED_FILE = "rejected.jsonl"
SCORES_FILE = "scores.parquet"
FORMAT = 2
READABLE = (1, 2)
"""In format 1, ``content_sha256`` was the hash of the samples themselves, not of their hashes."""

HASHED_BYTES = 512_000_000
"""Shards of up to this total size are hashed at every start, in under a second; larger ones on demand."""

_YOUNG = {it.name for it in fields(Preparation) if rules_of(it).omitted_from_digest_at_default}

REBUILD = "`python -m data.write_shards RECIPE --rebuild` builds them again"


@dataclass(frozen=True)
class SplitRecord:
    """One split of a domain."""

    documents: int
    samples: int
    tokens: int
    """Token ids, including end-of-text tokens but not padding."""
    padding_tokens: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    unigram_entropy: float
    """Entropy of the token frequencies in nats per token: the loss of a model without context."""
    content_sha256: str
    """Hash over each sample's hash of documents, lengths and tokens; independent of the shard size."""
    index_sha256: str
    """Hash of the index, which contains the hash of each shard file."""
    trained_tokens: int | None = None
    """Tokens that have a loss, of shards with a loss mask; null: there is none, and all have one."""
    trained_bytes: int | None = None
    """UTF-8 bytes of the text that they spell."""
    files: int | None = None
    """Files that the documents were joined of, where a source's repositories are; null: none were."""
    file_bytes: int | None = None
    """UTF-8 bytes of these files."""

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are nats per token / ln 2 / this."""
        if self.trained_tokens and self.trained_bytes is not None:
            return self.trained_bytes / self.trained_tokens
        return self.text_bytes / self.tokens


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset that a domain's documents come from."""

    name: str
    version: str
    source: str
    """Place of publication."""
    licence: str


@dataclass(frozen=True)
class DomainRecord:
    """One domain: its provenance and its splits."""

    source: str
    licence: str
    transformation: str
    documents_sha256: str
    """Hash of the list of documents."""
    splits: dict[str, SplitRecord]
    datasets: list[DatasetRecord] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    """Rejected records and documents, by reason; each is listed in ``rejected.jsonl``."""
    rejected_sha256: str | None = None
    """Hash of that list."""
    rejected_bytes: int = 0
    """UTF-8 bytes of their text; of lines, rows and files without a text, their own."""
    losses: list[str] = field(default_factory=list)
    """A line for each source and file that lost most or all of its records."""
    scores_sha256: str | None = None
    """Hash of the documents' scores; null: there are none."""
    personal_data: dict[str, int] | None = None
    """Personal data found in the documents, by kind; null: none was looked for."""

    @property
    def is_masked(self) -> bool:
        """Returns whether only some tokens have a loss."""
        return any(split.trained_tokens is not None for split in self.splits.values())

    @property
    def facts(self) -> dict[str, str]:
        """Provenance facts for governance, one text each."""
        return {
            "dataset": "; ".join(dict.fromkeys(it.name for it in self.datasets)),
            "version": "; ".join(dict.fromkeys(it.version for it in self.datasets)),
            "origin": self.source,
            "licence": self.licence,
            "transformation": self.transformation,
        }


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that encoded the shards."""

    name: str
    fingerprint: str
    vocab_size: int
    eos_id: int
    pad_id: int
    files: dict[str, str] = field(default_factory=dict)
    """Its files, next to the manifest, with their hashes; older manifests list none."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of a folder of shards."""

    format: int
    tokenizer: TokenizerRecord
    sequence_tokens: int
    corpus: str | None
    """This project's corpus that the shards were built from; null: other sources."""
    corpus_bytes: int | None
    """Bound on the text per domain at the time of the build."""
    domains: dict[str, DomainRecord]
    preparation_sha256: str | None = None
    """Digest of the recipe's sources and their preparation, see :func:`preparation_digest`."""

    @property
    def digest(self) -> str:
        """SHA-256 of all of the above: equal for equal shards, wherever they are stored."""
        return _digest(self._tree())

    def to_json(self) -> str:
        """Returns the text of the file."""
        return json.dumps(self._tree() | {"digest": self.digest}, indent=1, sort_keys=True) + "\n"

    def _tree(self) -> dict[str, Any]:
        """The values by name; those of loss masks, scores and repositories only where there are any, so that
        other shards stay as they were.
        """
        tree = asdict(self)
        for domain in tree["domains"].values():
            for name in ("scores_sha256", "personal_data"):
                if domain[name] is None:
                    del domain[name]
            for split in domain["splits"].values():
                for name in ("trained_tokens", "trained_bytes", "files", "file_bytes"):
                    if split[name] is None:
                        del split[name]
        return tree


def read_manifest(root: Path, name: str = MANIFEST_FILE) -> Manifest:
    """Reads the manifest of a folder of shards; checks nothing else.

    Args:
        root: the folder.
        name: name of the file, if it is still a temporary one.

    Raises:
        UserError: if there is no manifest, or this version can't read it.
    """
    path = root / name
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        if tree["format"] not in READABLE:
            raise UserError(
                f"{path} has format {tree['format']}, not {FORMAT}", key="data.shards", remedy=REBUILD
            )
        if tree.pop("digest") != _digest(tree):
            raise ValueError("its digest differs")
        names = [[domain, *entry["splits"]] for domain, entry in tree["domains"].items()]
        for each in itertools.chain(tree["tokenizer"].get("files", {}), *names):
            if unfit := unfit_as_file(each):
                raise ValueError(f"the name {each!r} {unfit}")
        domains = {name: _domain_record(entry) for name, entry in tree["domains"].items()}
        return Manifest(**(tree | {"tokenizer": TokenizerRecord(**tree["tokenizer"]), "domains": domains}))
    except OSError as error:
        raise UserError(
            f"no shards at {root} ({error.strerror})",
            key="data.shards",
            remedy="correct the path, or build them with `python -m data.write_shards RECIPE`",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error})", key="data.shards", remedy=REBUILD) from None


def join_manifests(one: Manifest, other: Manifest) -> Manifest:
    """Builds the manifest of a folder that holds the domains of both.

    Raises:
        UserError: if tokenizers or sequence lengths differ, or a common domain does.
    """
    for what, mine, theirs in (
        ("tokenizer", one.tokenizer.fingerprint[:12], other.tokenizer.fingerprint[:12]),
        ("sequence_tokens", one.sequence_tokens, other.sequence_tokens),
    ):
        if mine != theirs:
            raise UserError(
                f"is {theirs} there, and {mine} here", key=what, remedy="prepare both the same way"
            )
    for name in one.domains.keys() & other.domains.keys():
        if one.domains[name] != other.domains[name]:
            remedy = "give each domain a different name"
            raise UserError(f"{name} there differs from {name} here", key="data.domains", remedy=remedy)
    domains = dict(sorted({**other.domains, **one.domains}.items()))
    # The joined shards don't come from one recipe's sources; each domain's record names its own.
    return replace(
        one, format=FORMAT, domains=domains, corpus=None, corpus_bytes=None, preparation_sha256=None
    )


def check_shards(root: Path, *, every_byte: bool = False) -> Manifest:
    """Compares the files of a folder of shards with its manifest.

    Args:
        root: the folder.
        every_byte: see :func:`check_files`.

    Raises:
        UserError: one line that names the first file that is missing, truncated or altered.
    """
    manifest = read_manifest(root)
    check_files(root, manifest, lambda name, side: open_index(root / name / side), every_byte=every_byte)
    return manifest


def check_files(
    root: Path, manifest: Manifest, index_of: Callable[[str, str], ShardIndex], *, every_byte: bool = False
) -> None:
    """Compares the files of a folder of shards with its manifest, which has already been read.

    Args:
        root: the folder.
        manifest: its manifest.
        index_of: opens the index of a domain's split, once its hash has been checked.
        every_byte: hash the shards whatever their size; otherwise only sizes are compared if the shards
            exceed :data:`HASHED_BYTES` in total.

    Raises:
        UserError: one line that names the first file that is missing, truncated or altered.
    """
    indexes: list[ShardIndex] = []
    for name, sha256 in manifest.tokenizer.files.items():
        _require_sound(root / name, sha256)
    for name, domain in manifest.domains.items():
        _require_sound(root / name / DOCUMENTS_FILE, domain.documents_sha256)
        if domain.rejected_sha256 is not None:
            _require_sound(root / name / REJECTED_FILE, domain.rejected_sha256)
        if domain.scores_sha256 is not None:
            _require_sound(root / name / SCORES_FILE, domain.scores_sha256)
        for side, split in domain.splits.items():
            _require_sound(root / name / side / INDEX_FILE, split.index_sha256)
            indexes.append(index_of(name, side))
    total_bytes = 0
    for index in indexes:
        for shard in index:
            _refuse(shard.path, file_mismatch(shard.path, shard.bytes, None))
            total_bytes += shard.bytes
    if every_byte or total_bytes <= HASHED_BYTES:
        for index in indexes:
            for number in range(len(index)):
                _refuse(index[number].path, index.mismatch(number))


def require_match(manifest: Manifest, recipe: Recipe, tokenizer: TokenizerHandle | None = None) -> None:
    """Raises an error if shards do not match a recipe.

    Args:
        manifest: the shards' manifest.
        recipe: the recipe that they must match.
        tokenizer: the opened tokenizer, to compare its fingerprint too.

    Raises:
        UserError: one line that names the key and both values.
    """
    data, made_by = recipe.data, manifest.tokenizer
    other_place = f"{REBUILD}, or give another data.shards"
    name = name_of(recipe.tokenizer)
    if name != made_by.name:
        what = f"is {name}, but {data.shards} was made with {made_by.name}"
        raise UserError(what, key="tokenizer.kind", remedy=other_place)
    if tokenizer is not None and tokenizer.fingerprint != made_by.fingerprint:
        ours, theirs = tokenizer.fingerprint[:12], made_by.fingerprint[:12]
        what = f"{name} has fingerprint {ours}, but {data.shards} was made with {theirs}"
        raise UserError(what, key="tokenizer", remedy=other_place)
    require_rows(recipe, made_by.vocab_size)
    if data.sequence_tokens != manifest.sequence_tokens:
        what = f"is {data.sequence_tokens}, but {data.shards} has sequences of {manifest.sequence_tokens}"
        raise UserError(what, key="data.sequence_tokens", remedy=other_place)
    if data.corpus is not None and (data.corpus, data.corpus_bytes) != (
        manifest.corpus,
        manifest.corpus_bytes,
    ):
        what = f"is {data.corpus_bytes}, but {data.shards} was built with {manifest.corpus_bytes}"
        raise UserError(what, key="data.corpus_bytes", remedy=other_place)
    if (data.sources or data.corpus) and preparation_digest(recipe) != manifest.preparation_sha256:
        what = f"differ from those that {data.shards} was built from, or their preparation does"
        key = "data.sources" if data.sources else "data.preparation"
        raise UserError(what, key=key, remedy=other_place)
    keys = {name: f"data.domains.{name}" if data.domains else "data.phases" for name in domains_of(recipe)}
    for domain, key in (keys | dict.fromkeys(data.validation_domains, "data.validation_domains")).items():
        if domain not in manifest.domains:
            there = ", ".join(manifest.domains)
            raise UserError(f"{data.shards} has no domain {domain}", key=key, remedy=f"it has {there}")
    masked = [name for name in domains_of(recipe) if manifest.domains[name].is_masked]
    if masked and recipe.training.loss_mean is LossMean.positions:
        what = f"is positions, but only some tokens of {masked[0]} in {data.shards} have a loss"
        raise UserError(what, key="training.loss_mean", remedy="set it to targets")
    _require_fill_in_middle(manifest, recipe, tokenizer)


def _require_fill_in_middle(manifest: Manifest, recipe: Recipe, tokenizer: TokenizerHandle | None) -> None:
    """Raises if a phase rearranges documents that have a loss mask, or the tokenizer has no tokens for it.

    Raises:
        UserError: one line that names the key.
    """
    for index, phase in enumerate(phases_of(recipe)):
        own = f"data.phases[{index}]" if recipe.data.phases else "data"
        asked = () if phase.fill_in_middle is None else phase.fill_in_middle.domain_shares
        for name in fill_in_middle_shares(phase).keys() & asked:
            if manifest.domains[name].is_masked:
                what = f"only some tokens of {name} in {recipe.data.shards} have a loss"
                remedy = "remove it: documents with a loss mask are not rearranged"
                raise UserError(what, key=f"{own}.fill_in_middle.domain_shares", remedy=remedy)
    if tokenizer is not None and fills_in_middle(recipe):
        find_sentinels(tokenizer, recipe.tokenizer)


def require_rows(recipe: Recipe, ids: int) -> None:
    """Raises if a recipe's model has fewer rows than a tokenizer of kind ``hf`` has ids.

    Of other kinds the recipe's rules know the number.

    Raises:
        UserError: one line that names the key and both numbers.
    """
    if recipe.tokenizer.kind is TokenizerKind.hf and recipe.model.vocab_size < ids:
        what = f"{recipe.model.vocab_size} rows, but the tokenizer makes ids up to {ids - 1}"
        raise UserError(what, key="model.vocab_size", remedy=f"set it to at least {ids}")


def preparation_digest(recipe: Recipe) -> str | None:
    """Digest of the recipe's keys on sources and their preparation; None if there is nothing to tell.

    Keys for the location of files, the size of tasks and the compression of shards are not part of it: the
    schema marks them (``in_shards_digest``). The installed corpus and given documents have no sources and are
    neither filtered nor deduplicated: only younger keys than these stages are told, if not at their default.
    """
    data = to_dict(recipe)["data"]
    preparation = _digested(Preparation, data["preparation"])
    if not recipe.data.sources:
        told = {name: preparation[name] for name in sorted(_YOUNG & preparation.keys())}
        return _digest(told) if told else None
    return _digest(
        {
            "sources": [_digested(Source, source) for source in data["sources"]],
            "preparation": preparation,
            "removes_evaluation_text": bool(data["preparation"]["evaluation_texts"]),
        }
    )


def _digested(schema: type[Source | Preparation], values: dict[str, Any]) -> dict[str, Any]:
    """The values of the keys that change the shards."""
    return {
        it.name: values[it.name]
        for it in fields(schema)
        if rules_of(it).in_shards_digest
        and not (rules_of(it).omitted_from_digest_at_default and values[it.name] == _default(it))
    }


def _default(schema_field: Field[Any]) -> Any:
    factory = schema_field.default_factory
    return schema_field.default if factory is MISSING else factory()


def unigram_entropy(tokens: NDArray[np.integer[Any]]) -> float:
    """Entropy of the frequencies of token ids, in nats per token: the loss of a model without context."""
    return entropy(np.bincount(tokens))


def entropy(counts: NDArray[np.integer[Any]]) -> float:
    """Entropy of a distribution given by counts, in nats; 0 for none."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log(shares)).sum())


def _domain_record(entry: dict[str, Any]) -> DomainRecord:
    splits = {side: SplitRecord(**it) for side, it in entry["splits"].items()}
    datasets = [DatasetRecord(**it) for it in entry.get("datasets", [])]
    return DomainRecord(**(entry | {"splits": splits, "datasets": datasets}))


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _require_sound(path: Path, sha256: str) -> None:
    _refuse(path, file_mismatch(path, None, sha256))


def _refuse(path: Path, mismatch: str) -> None:
    if mismatch:
        raise UserError(f"{path} {mismatch}", key="data.shards", remedy=REBUILD)
