"""One start of a run opens, hashes and builds each part of its data once."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.recipe.schema import Recipe
from train.recipe.topology import Topology

pytestmark = pytest.mark.slow

TinyRecipe = Callable[..., Recipe]


class Openings:
    """Counts calls of real functions by the files they open."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._patch = patch

    def count(self, function: Callable[..., Any], what: Callable[..., object] = lambda *_, **__: "") -> None:
        """Counts a function under any name by which modules have imported it."""
        counted = self._counted(function.__name__, function, what)
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is function:
                    self._patch.setattr(module, name, counted)

    def count_made(self, kind: type, what: Callable[..., object] = lambda *_, **__: "") -> None:
        """Counts the objects of a class."""
        made = self._counted(kind.__name__, kind.__init__, lambda _, *args, **named: what(*args, **named))
        self._patch.setattr(kind, "__init__", made)

    def of(self, name: str) -> dict[str, int]:
        return {what: count for (called, what), count in self.counts.items() if called == name}

    def _counted(
        self, name: str, function: Callable[..., Any], what: Callable[..., object]
    ) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.counts[name, str(what(*args, **named))] += 1
            return function(*args, **named)

        return counted


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: TinyRecipe) -> Path:
    from data.write_shards import build_shards

    folder = tmp_path_factory.mktemp("shards") / "tiny"
    build_shards(tiny_recipe(folder.parent, folder, "builds"))
    return folder


@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_start_opens_hashes_and_builds_everything_once(
    tmp_path: Path, shards: Path, tiny_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from data.order.plan import OrderPlan
    from data.shards.index import open_index
    from data.shards.manifest import read_manifest
    from data.shards.streams import ShardFolder
    from data.tokenizer import RankTokenizer
    from train.run import run

    root = shards if where == "folder" else tmp_path / "cache"
    store = [] if where == "folder" else [f"data.remote={shards}", "data.corpus=null"]
    # Worker processes would count separately; preflight reads the shards too.
    recipe = tiny_recipe(
        tmp_path,
        root,
        "counted",
        "data.workers=0",
        "preflight.when=always",
        "training.duration_tokens=512",
        *store,
    )
    openings = Openings(monkeypatch)
    openings.count(read_manifest, lambda folder, name="manifest.json": folder / name)
    openings.count(open_index, lambda folder: folder)
    openings.count(hashlib.file_digest, lambda file, *_: file.name)
    openings.count_made(OrderPlan)
    openings.count_made(RankTokenizer)
    openings.count_made(ShardFolder, lambda folder, *_: folder)
    assert run(recipe, Topology()) == 0

    splits = {str(root / domain / split) for domain in ("code", "prose") for split in ("train", "validation")}
    assert openings.of("OrderPlan") == openings.of("RankTokenizer") == {"": 1}
    assert openings.of("open_index") == openings.of("ShardFolder") == dict.fromkeys(splits, 1)
    manifest = root / ("manifest.json" if where == "folder" else ".manifest.json.partial")
    assert openings.of("read_manifest") == {str(manifest): 1}
    hashed = {file: count for file, count in openings.of("file_digest").items() if file.startswith(str(root))}
    assert set(hashed.values()) == {1}, hashed
    if where == "folder":
        assert {f"{split}/index.json" for split in splits} <= hashed.keys()
