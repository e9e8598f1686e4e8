"""The data of a recipe, opened: manifest, tokenizer, indexes and order, each once in a process.

Whatever reads a run's data takes its :class:`OpenedData`: the check before the start, the epoch budget, both
kinds of loaders, the search for the documents of an alarm, the evaluation, the audit. So an index of a
gigabyte is hashed and parsed once, and everyone means the same shards.
"""

from functools import cached_property
from pathlib import Path

from data.order.plan import OrderPlan
from data.shards.cache import open_cache
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
    """A recipe's shards, tokenizer and order; nothing is opened before it is asked for, and nothing twice.

    Args:
        recipe: the run. With ``data.remote``, :meth:`fetch` comes before everything else.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.root, self.cache = recipe, Path(recipe.data.shards), open_cache(recipe)
        self._indexes: dict[tuple[str, str], ShardIndex] = {}
        self._folders: dict[tuple[str, str], ShardFolder] = {}
        self._order: tuple[Curriculum, OrderPlan] | None = None
        self._is_fetched = False

    @cached_property
    def manifest(self) -> Manifest:
        """What the shards' folder holds.

        Raises:
            UserError: if there is no manifest, or none that this version reads.
        """
        return read_manifest(self.root)

    @cached_property
    def tokenizer(self) -> TokenizerHandle:
        """The recipe's tokenizer, whichever made the shards; :meth:`require_match` compares.

        Raises:
            UserError: if a trained tokenizer is missing or larger than the recipe says.
        """
        return open_tokenizer(self.recipe.tokenizer, self.root)

    @property
    def validated_domains(self) -> list[str]:
        """Names of the domains that have a validation loss, sorted: those trained on, and those added."""
        return sorted({*domains_of(self.recipe), *self.recipe.data.validation_domains})

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
        """The order of the run's samples, built once for a curriculum.

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
        """The list of a domain's documents, fetched where it lies in a store.

        Raises:
            UserError: if the store's is not the one that the manifest means.
        """
        path = self.root / domain / DOCUMENTS_FILE
        if self.cache is not None:
            self.cache.require(path, self.manifest.domains[domain].documents_sha256)
        return path

    def fetch(self) -> None:
        """Brings manifest, tokenizer and indexes from ``data.remote`` to this node; no-op without one.

        Every process calls it: those of a node share what one of them has fetched.

        Raises:
            UserError: one line, if the store does not give them.
        """
        if self.cache is None or self._is_fetched:
            return
        if not (self.root / MANIFEST_FILE).is_file():
            self.fetch_manifest()
        if not set(self.validated_domains) <= self.manifest.domains.keys():
            self.fetch_manifest()  # Domains have joined since this node fetched it.
        if self.recipe.tokenizer.kind is TokenizerKind.bpe:
            self.cache.require(self.root / TOKENIZER_FILE, None)
        for name, domain in self.manifest.domains.items():
            for side, split in domain.splits.items():
                self.cache.require(self.root / name / side / INDEX_FILE, split.index_sha256)
        self._is_fetched = True

    def fetch_manifest(self) -> None:
        """Takes the store's manifest as it is now; the cache on this node then holds it too.

        Raises:
            UserError: if the cache holds other shards, or the store has none.
        """
        assert self.cache is not None
        self.manifest = self.cache.fetch_manifest()

    def check(self) -> None:
        """Compares the files on this node with the manifest, see :func:`data.shards.manifest.check_files`."""
        check_files(self.root, self.manifest, self.index)

    def require_match(self) -> None:
        """Raises where the shards are not those that the recipe means, or another tokenizer made them.

        Raises:
            UserError: one line that names the key and both values.
        """
        require_match(self.manifest, self.recipe, self.tokenizer)


def open_data(recipe: Recipe) -> OpenedData:
    """A recipe's data, with manifest and indexes on this node.

    Raises:
        UserError: one line, if ``data.remote`` names a store that does not give them.
    """
    opened = OpenedData(recipe)
    opened.fetch()
    return opened
