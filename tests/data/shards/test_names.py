"""Names from a store's manifest and indexes lead to no file outside of the cache."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data.opened import open_data
from data.shards.cache import ShardCache
from data.shards.index import open_index
from data.shards.manifest import MANIFEST_FILE, Manifest, read_manifest
from train.recipe.errors import UserError
from train.recipe.schema import Recipe

OUTSIDE = (
    "../../../home/profile",
    "/etc/profile",
    "..",
    ".",
    "",
    "a/b",
    "..\\profile",
    ".locks",
    "a\nb",
    "x" * 300,
)


@pytest.fixture
def store(built: Recipe, tmp_path: Path) -> Path:
    return shutil.copytree(built.data.shards, tmp_path / "store/shards")


def read_from(store: Path, built: Recipe, cache: Path) -> None:
    """Reads all shards of a store through a cache."""
    data = dataclasses.replace(built.data, remote=str(store), shards=str(cache))
    opened = open_data(dataclasses.replace(built, data=data))
    for domain in opened.manifest.domains:
        opened.shards(domain, "train")[0]


def rewrite(store: Path, manifest: Manifest) -> None:
    (store / MANIFEST_FILE).write_text(manifest.to_json())


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("what", ["shard", "domain", "split"])
def test_a_name_leaves_no_cache(store: Path, built: Recipe, tmp_path: Path, name: str, what: str) -> None:
    manifest = read_manifest(store)
    code = manifest.domains["code"]
    if what == "shard":
        index = store / "code/train/index.json"
        tree = json.loads(index.read_bytes())
        tree["shards"][0]["raw_data"]["basename"] = name
        index.write_text(json.dumps(tree))
        digest = hashlib.sha256(index.read_bytes()).hexdigest()
        train = dataclasses.replace(code.splits["train"], index_sha256=digest)
        code = dataclasses.replace(code, splits=code.splits | {"train": train})
        manifest = dataclasses.replace(manifest, domains=manifest.domains | {"code": code})
    elif what == "domain":
        manifest = dataclasses.replace(manifest, domains=manifest.domains | {name: code})
    else:
        code = dataclasses.replace(code, splits=code.splits | {name: code.splits["train"]})
        manifest = dataclasses.replace(manifest, domains=manifest.domains | {"code": code})
    rewrite(store, manifest)
    home = tmp_path / "home"
    home.mkdir()
    (home / "profile").write_text("precious")
    before = files_below(tmp_path)
    cache = tmp_path / "node/a/cache"
    with pytest.raises(UserError, match=r"is damaged \(the (shard's )?name .*\)") as raised:
        read_from(store, built, cache)
    assert "\n" not in str(raised.value)
    after = {file: content for file, content in files_below(tmp_path).items() if "node/a/cache" not in file}
    assert after == before
    assert not (cache / "code/train").exists() or not list((cache / "code/train").glob("*.mds"))


def test_a_sound_store_is_read(store: Path, built: Recipe, tmp_path: Path) -> None:
    read_from(store, built, tmp_path / "cache")
    assert (tmp_path / "cache/code/train/index.json").is_file()


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x"])
def test_a_cache_fetches_nothing_to_the_outside(tmp_path: Path, path: str) -> None:
    (tmp_path / "store").mkdir()
    cache = ShardCache(tmp_path / "cache", str(tmp_path / "store"))
    with pytest.raises(UserError, match="names a file outside of its folder"):
        cache.require(tmp_path / "cache" / path, None)
    assert not (tmp_path / "x").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content", ["", "{", '{"shards": [{}]}', '{"shards": [7]}', '{"shards": [{"raw_data": 1}]}']
)
def test_a_damaged_index_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        open_index(tmp_path)
