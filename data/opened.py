"""A recipe's data, opened once per process: manifest, tokenizer, indexes and sample order.

Everything that reads a run's data takes its :class:`OpenedData`: the check before the start, the epoch
budget, the loaders, the lookup of an alarm's documents, evaluation, the audit. So an index of a gigabyte is
hashed and parsed only once, and all of them read the same shards.
"""

import copy
from functools import cached_property
from pathlib import Path

from data.order.plan import OrderPlan
from data.shards.cache import open_cache
from data.shards.enough import validated_domains
from data.shards.index import INDEX_FILE, ShardIndex, open_index
from data.shards.manifest import (
    DOCUMENTS_FILE,
    MANIFEST_FILE,
    Manifest,
    check_files,
    read_manifest,
    require_match,
)
from data.shards.streams import ShardFolder
from data.tokenizer import TOKENIZER_FILE, TokenizerHandle, open_tokenizer
from train.recipe.curriculum import Curriculum
from train.recipe.phases import domains_of
from train.recipe.schema import Recipe, TokenizerKind


class OpenedData:
    """A recipe's shards, tokenizer and sample order, each opened on first use and only once.

    Args:
        recipe: the run's recipe. With ``data.remote``, call :meth:`fetch` before anything else.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.root, self.cache = recipe, Path(recipe.data.shards), open_cache(recipe)
        self._indexes: dict[tuple[str, str], ShardIndex] = {}
        self._folders: dict[tuple[str, str], ShardFolder] = {}
        self._order: tuple[Curriculum, OrderPlan] | None = None
        self._is_fetched = False

    def under(self, recipe: Recipe) -> "OpenedData":
        """The same data, of a recipe that differs from this one in its layout only."""
        other = copy.copy(self)
        other.recipe = recipe
        return other

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the shards' folder.

        Raises:
            UserError: if there is no manifest, or this version can't read it.
        """
        return read_manifest(self.root)

    @cached_property
    def tokenizer(self) -> TokenizerHandle:
        """The recipe's tokenizer; :meth:`require_match` compares it with the one that made the shards.

        Raises:
            UserError: if a trained tokenizer is missing or larger than the recipe says.
        """
        return open_tokenizer(self.recipe.tokenizer, self.root)

    @property
    def validated_domains(self) -> list[str]:
        """Sorted names of the domains with a validation loss: those trained on, and those added to them."""
        return validated_domains(self.recipe)

    def index(self, domain: str, split: str) -> ShardIndex:
        """The index of a domain's split."""
        if (domain, split) not in self._indexes:
            self._indexes[domain, split] = open_index(self.root / domain / split)
        return self._indexes[domain, split]

    def shards(self, domain: str, split: str) -> ShardFolder:
        """The samples of a domain's split; no shard is opened."""
        if (domain, split) not in self._folders:
            index = self.index(domain, split)
            self._folders[domain, split] = ShardFolder(self.root / domain / split, self.cache, index)
        return self._folders[domain, split]

    def plan(self, curriculum: Curriculum) -> OrderPlan:
        """The order of the run's samples, built once per curriculum.

        Args:
            curriculum: the run's stages.
        """
        if self._order is None or self._order[0] != curriculum:
            sizes = {domain: self.shards(domain, "train").shard_samples for domain in domains_of(self.recipe)}
            plan = OrderPlan(
                curriculum.segments(),
                sizes,
                seed=self.recipe.seed,
                window_shards=self.recipe.data.window_shards,
            )
            self._order = curriculum, plan
        return self._order[1]

    def documents_file(self, domain: str) -> Path:
        """The list of a domain's documents, fetched if it is in an object store.

        Raises:
            UserError: if the store's list does not match the manifest.
        """
        path = self.root / domain / DOCUMENTS_FILE
        if self.cache is not None:
            self.cache.require(path, self.manifest.domains[domain].documents_sha256)
        return path

    def fetch(self) -> None:
        """Fetches manifest, tokenizer and indexes from ``data.remote`` to this node; no-op without one.

        Every process calls it; the processes of a node share the files.

        Raises:
            UserError: one line, if the store does not provide them.
        """
        if self.cache is None or self._is_fetched:
            return
        if not (self.root / MANIFEST_FILE).is_file():
            self.fetch_manifest()
        if not set(self.validated_domains) <= self.manifest.domains.keys():
            self.fetch_manifest()  # Domains were added since this node fetched it.
        files: dict[str, str | None] = {**self.manifest.tokenizer.files}
        if not files and self.recipe.tokenizer.kind is not TokenizerKind.cl100k_base:
            files = {TOKENIZER_FILE: None}  # Older manifests list no files.
        for name, sha256 in files.items():
            self.cache.require(self.root / name, sha256)
        for name, domain in self.manifest.domains.items():
            for side, split in domain.splits.items():
                self.cache.require(self.root / name / side / INDEX_FILE, split.index_sha256)
        self._is_fetched = True

    def fetch_manifest(self) -> None:
        """Fetches the store's current manifest into the cache of this node.

        Raises:
            UserError: if the cache holds other shards, or the store has none.
        """
        assert self.cache is not None
        self.manifest = self.cache.fetch_manifest()

    def check(self) -> None:
        """Compares the files on this node with the manifest, see :func:`data.shards.manifest.check_files`."""
        check_files(self.root, self.manifest, self.index)

    def require_match(self) -> None:
        """Raises an error if the shards do not match the recipe, or another tokenizer made them.

        Raises:
            UserError: one line that names the key and both values.
        """
        require_match(self.manifest, self.recipe, self.tokenizer)


def open_data(recipe: Recipe) -> OpenedData:
    """Opens a recipe's data, with manifest and indexes on this node.

    Raises:
        UserError: one line, if the store at ``data.remote`` does not provide them.
    """
    opened = OpenedData(recipe)
    opened.fetch()
    return opened
