"""Draws random documents with their tokens from each domain of a folder of shards."""

import itertools
import json
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.opened import open_data
from data.shards.cache import ShardCache
from data.shards.manifest import (
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    SCORES_FILE,
    DomainRecord,
    Manifest,
    read_manifest,
)
from data.shards.streams import ShardFolder
from data.text.split import SPLITS
from data.tokenizer import TokenizerHandle, open_tokenizer
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Tokenizer, TokenizerKind
from train.record.run_folder import RECIPE_FILE


@dataclass(frozen=True)
class Document:
    """A document of the shards."""

    domain: str
    name: str
    split: str
    tokens: NDArray[np.int32]
    """Its token ids, without the end-of-text token."""
    sequences: int = 1
    """Sequences that it lies in; more than one: it is cut."""
    trained: NDArray[np.bool_] | None = None
    """Which of its tokens have a loss; None: all."""


@dataclass(frozen=True)
class Shards:
    """A folder of shards, or one domain of it, opened for reading."""

    root: Path
    manifest: Manifest
    domains: dict[str, DomainRecord]
    """The selected domains."""
    cache: ShardCache | None = None
    """Fetches missing files; None: all files are local."""

    @classmethod
    def open(cls, place: Path) -> "Shards":
        """Opens the shards of a mixture, of one of its domains, or of a run.

        Args:
            place: a folder with ``manifest.json``, a domain's folder inside one, or ``runs/NAME``.

        Raises:
            UserError: if it is none of these.
        """
        place = place.resolve()
        if (place / RECIPE_FILE).is_file():
            opened = open_data(load_recipe(place / RECIPE_FILE))
            return cls(opened.root, opened.manifest, opened.manifest.domains, opened.cache)
        if not (place / MANIFEST_FILE).is_file() and (place.parent / MANIFEST_FILE).is_file():
            manifest = read_manifest(place.parent)
            if place.name in manifest.domains:
                return cls(place.parent, manifest, {place.name: manifest.domains[place.name]})
        manifest = read_manifest(place)
        return cls(place, manifest, manifest.domains)

    def open_tokenizer(self) -> TokenizerHandle:
        """Opens the tokenizer that made the shards."""
        made_by = self.manifest.tokenizer
        if made_by.name == TokenizerKind.cl100k_base.value:
            return open_tokenizer(Tokenizer(TokenizerKind.cl100k_base), self.root)
        if made_by.name == TokenizerKind.hf.value:
            return open_tokenizer(Tokenizer(TokenizerKind.hf), self.root)
        size = int(made_by.name.rpartition("-")[2])
        return open_tokenizer(Tokenizer(TokenizerKind.bpe, size), self.root)

    def file(self, domain: str, name: str) -> Path:
        """The path of a domain's list, fetched if it is in a store."""
        path, record = self.root / domain / name, self.domains[domain]
        if self.cache is not None:
            hashes = {
                DOCUMENTS_FILE: record.documents_sha256,
                REJECTED_FILE: record.rejected_sha256,
                SCORES_FILE: record.scores_sha256,
            }
            self.cache.require(path, hashes[name])
        return path

    def documents(self, domain: str) -> int:
        """Number of documents of a domain in both splits."""
        return sum(split.documents for split in self.domains[domain].splits.values())


def draw_documents(shards: Shards, domain: str, count: int, seed: int) -> list[Document]:
    """Draws documents of a domain uniformly at random; returns all of them if there are at most ``count``.

    Only the list of documents is read completely. Documents are located in the shards by binary search.

    Args:
        shards: the shards.
        domain: name of the domain.
        count: number of documents.
        seed: the same seed draws the same documents.

    Raises:
        UserError: if a shard is missing or altered.
    """
    total = shards.documents(domain)
    rng = np.random.default_rng([seed, zlib.crc32(domain.encode())])
    wanted = np.sort(rng.choice(total, min(count, total), replace=False))
    finders = {side: Finder(ShardFolder(shards.root / domain / side, shards.cache)) for side in SPLITS}
    drawn = []
    for ordinal, line in _lines_at(shards.file(domain, DOCUMENTS_FILE), wanted.tolist()):
        split = line.get("split", "train")
        tokens, trained, sequences = finders[split].read(ordinal)
        if tokens.size:
            mask = trained[:-1] if shards.domains[domain].is_masked else None
            drawn.append(Document(domain, line["name"], split, tokens[:-1], sequences, mask))
    return drawn


def draw_lines(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Draws random lines of a JSONL file, in file order, in one pass (reservoir sampling, Vitter 1985)."""
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, str]] = []
    with path.open() as file:
        for number, line in enumerate(file):
            if number < count:
                kept.append((number, line))
            elif (place := int(rng.integers(number + 1))) < count:
                kept[place] = number, line
    return [json.loads(line) for _, line in sorted(kept)]


class Finder:
    """Finds the documents of a folder of shards.

    Whatever the packing, the documents that sequences begin with rise through a split, so one that begins a
    sequence is found by binary search, as is any that was packed end to end. Packed by best fit, others, and
    what is left of one that fills sequences, lie anywhere in the same shard, which is read once for them.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self.folder = folder
        self._shard = -1
        self._samples_of: dict[int, list[int]] = {}

    def samples_of(self, ordinal: int) -> list[int]:
        """The samples that contain a document, rising; empty if the folder does not contain it."""
        count, documents = len(self.folder), lambda n: self.folder[n].documents
        at = bisect_left(range(count), ordinal, key=lambda n: int(documents(n)[0]))
        near = range(max(at - 1, 0), min(at + 1, count))
        first = next((n for n in near if ordinal in documents(n)), count)
        found = list(itertools.takewhile(lambda n: ordinal in documents(n), range(first, count)))
        if found and documents(found[-1]).size > 1:
            return found
        ends = np.cumsum(self.folder.shard_samples)
        shards = dict.fromkeys(int(np.searchsorted(ends, n, "right")) for n in found[-1:] or near)
        others = [n for shard in shards for n in self._in_shard(shard, ordinal)]
        return sorted({*found, *others})

    def _in_shard(self, shard: int, ordinal: int) -> list[int]:
        if shard != self._shard:
            self._shard, self._samples_of = shard, {}
            end = int(self.folder.shard_samples[: shard + 1].sum())
            for n in range(end - int(self.folder.shard_samples[shard]), end):
                for document in self.folder[n].documents.tolist():
                    self._samples_of.setdefault(document, []).append(n)
        return self._samples_of.get(ordinal, [])

    def read(self, ordinal: int) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
        """Returns a document's token ids with what ends it, which of them have a loss, and its sequences.

        Both are empty if it is not there.
        """
        pieces, numbers = [np.empty(0, np.int32)], self.samples_of(ordinal)
        masks = [np.empty(0, np.bool_)]
        for number in numbers:
            sample = self.folder[number]
            is_own = np.repeat(sample.documents, sample.lengths) == ordinal
            pieces.append(sample.tokens[is_own])
            masks.append(sample.is_trained()[is_own])
        return np.concatenate(pieces), np.concatenate(masks), len(numbers)


def _lines_at(path: Path, numbers: list[int]) -> list[tuple[int, dict[str, Any]]]:
    wanted = set(numbers)
    with path.open() as file:
        found = [(n, json.loads(line)) for n, line in enumerate(file) if n in wanted]
    if len(found) != len(wanted):
        remedy = "`python -m data.write_shards RECIPE --rebuild` builds the shards again"
        raise UserError(f"{path} has fewer lines than the manifest has documents", remedy=remedy)
    return found
