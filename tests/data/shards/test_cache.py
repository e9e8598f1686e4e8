"""Shards in a store that fails, stalls and corrupts data, and a cache smaller than the shards."""

import dataclasses
import errno
import http.client
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data.loader import build_train_loader
from data.opened import OpenedData, open_data
from data.shards.cache import Patience, ShardCache
from data.shards.streams import ShardFolder
from data.shards.upload import upload_shards
from data.write_shards import build_shards, ensure_shards
from tests.data.conftest import small_documents
from train.recipe.errors import UserError
from train.recipe.preparation import Preparation
from train.recipe.schema import Recipe

pytestmark = pytest.mark.slow

BUCKET = "shards"
HURRIED = Patience(attempts=4, first_pause_seconds=0.01, stall_seconds=0.5)


class FaultyStore:
    """A proxy for moto's S3 that injects faults into the next reads of shards."""

    def __init__(self, port: int) -> None:
        self.faults: list[str] = []
        self.shard_reads = 0
        store = self

        class StoreHandler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                self.forward("")

            def do_GET(self) -> None:
                fault = ""
                if ".mds" in self.path:
                    store.shard_reads += 1
                    fault = store.faults.pop(0) if store.faults else ""
                self.forward(fault)

            def forward(self, fault: str) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", port)
                upstream.request(self.command, self.path, headers=dict(self.headers))
                answer = upstream.getresponse()
                body = answer.read()
                status = 500 if fault == "fails" else answer.status
                if fault == "flips":
                    body = body[:100] + bytes([body[100] ^ 4]) + body[101:]
                self.send_response(status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(key, value)
                self.end_headers()
                if fault == "stalls":
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    time.sleep(1.5)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), StoreHandler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Recipe:
    """Shards of a few samples each."""
    recipe = make_recipe(tmp_path_factory.mktemp("source") / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.text.mds.SHARD_BYTES", 2000)
        build_shards(recipe, documents=small_documents)
    assert len(list(Path(recipe.data.shards).glob("*/train/*.mds"))) > 10
    return recipe


@pytest.fixture(scope="module")
def store(source: Recipe) -> Iterator[FaultyStore]:
    """An S3 server that holds the shards, behind a proxy."""
    pytest.importorskip("flask")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = FaultyStore(port)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("S3_ENDPOINT_URL", proxy.address)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket=BUCKET)
        root = Path(source.data.shards)
        for path in root.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, path.relative_to(root).as_posix())
        yield proxy
    proxy.server.shutdown()
    server.stop()


def cached(root: Path, remote: str, limit: int | None = None) -> tuple[ShardCache, ShardFolder]:
    """Returns a cache of the prose domain and its folder, with indices fetched."""
    cache = ShardCache(root, remote, limit, HURRIED)
    manifest = cache.fetch_manifest()
    cache.require(root / "prose/train/index.json", manifest.domains["prose"].splits["train"].index_sha256)
    return cache, ShardFolder(root / "prose/train", cache)


def all_tokens(folder: ShardFolder) -> list[list[int]]:
    return [folder[number].tokens.tolist() for number in range(len(folder))]


@pytest.fixture
def whole(source: Recipe) -> list[list[int]]:
    return all_tokens(ShardFolder(Path(source.data.shards) / "prose/train"))


@pytest.mark.parametrize("fault", ["fails", "stalls", "flips"])
def test_a_store_that_fails_stalls_or_alters_is_asked_again(
    tmp_path: Path, store: FaultyStore, whole: list[list[int]], fault: str, capsys: pytest.CaptureFixture[str]
):
    store.faults[:] = [fault, "", fault]
    _, folder = cached(tmp_path / "cache", f"s3://{BUCKET}")
    assert all_tokens(folder) == whole
    assert not store.faults
    assert not list((tmp_path / "cache").rglob("*.partial"))
    if fault == "fails":
        assert "retrying in" in capsys.readouterr().err


def test_a_store_that_never_recovers_is_named_in_one_line(tmp_path: Path, store: FaultyStore):
    _, folder = cached(tmp_path / "cache", f"s3://{BUCKET}")
    store.faults[:] = ["fails"] * 100
    with pytest.raises(UserError, match=r"s3://shards/prose/train/shard\.00000\.mds .*tried 4 times") as e:
        folder[0]
    assert "\n" not in str(e.value)
    store.faults.clear()
    with pytest.raises(UserError, match=r"s3://shards/none/manifest\.json .*not found"):
        ShardCache(tmp_path / "none", f"s3://{BUCKET}/none", patience=HURRIED).fetch_manifest()


def test_a_shard_that_is_altered_in_the_store_is_named(tmp_path: Path, source: Recipe):
    shutil.copytree(source.data.shards, tmp_path / "store")
    shard = tmp_path / "store/prose/train/shard.00000.mds"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    _, folder = cached(tmp_path / "cache", str(tmp_path / "store"))
    with pytest.raises(UserError, match=r"shard\.00000\.mds is altered: .*, also when fetched again"):
        folder[0]
    assert not list((tmp_path / "cache").glob("prose/train/*.mds*"))


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_shard_is_fetched_again_or_named(
    tmp_path: Path, source: Recipe, whole: list[list[int]], damage: str
):
    root = tmp_path / "cache"
    _, folder = cached(root, source.data.shards)
    assert all_tokens(folder) == whole
    shard = root / "prose/train/shard.00001.mds"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"prose/train/shard\.00001\.mds (is missing|has|is altered)"):
        all_tokens(ShardFolder(root / "prose/train"))
    assert all_tokens(ShardFolder(root / "prose/train", folder._cache)) == whole
    assert shard.read_bytes() == content


def test_a_shard_is_hashed_once(source: Recipe, monkeypatch: pytest.MonkeyPatch):
    import data.shards.index

    hashed: list[Path] = []
    real = data.shards.index.file_mismatch
    monkeypatch.setattr(
        "data.shards.index.file_mismatch", lambda p, *rest: hashed.append(p) or real(p, *rest)
    )
    monkeypatch.setattr("data.shards.open_maps.OPEN_SHARDS", 1)
    folder = ShardFolder(Path(source.data.shards) / "prose/train")
    assert not hashed
    for number in [0, len(folder) - 1, 1, len(folder) - 1]:
        folder[number]
    assert len(hashed) == 2


def test_the_cache_stays_within_its_limit_and_keeps_what_is_read(
    tmp_path: Path, source: Recipe, whole: list[list[int]]
):
    limit = 8000
    cache, folder = cached(tmp_path / "cache", source.data.shards, limit)
    for number in np.random.default_rng(3).permutation(len(folder)).tolist():
        assert folder[number].tokens.tolist() == whole[number]
        assert cache._kept_bytes() <= limit
        # No evicted shard stays open, or its space would never be freed.
        assert all(folder._index[shard].path.exists() for shard in folder.open_shards)
    assert folder.file_of(number).path.exists(), "the shard read last was evicted"
    with pytest.raises(UserError, match="cache_bytes: is 100, less than one shard"):
        cached(tmp_path / "tiny", source.data.shards, 100)[1][0]


def test_a_full_disk_evicts(tmp_path: Path, source: Recipe, monkeypatch: pytest.MonkeyPatch):
    from streaming.base.storage.download import LocalDownloader

    root = tmp_path / "cache"
    cache, folder = cached(root, source.data.shards)
    copy = LocalDownloader._download_file_impl

    def onto_small_disk(self: Any, remote: str, local: str, timeout: float) -> None:
        if cache._kept_bytes() + Path(remote).stat().st_size > 8000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(self, remote, local, timeout)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", onto_small_disk)
    assert all_tokens(folder)
    monkeypatch.setattr("tests.data.shards.test_cache.ShardCache._evict", lambda *_: 0)
    with pytest.raises(UserError, match="is full and holds no shard to evict"):
        ShardFolder(root / "prose/train", cache)[0]


def test_shards_that_other_processes_remove_meanwhile_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "code/train"
    folder.mkdir(parents=True)
    for number in range(4):
        path = folder / f"shard.{number:05}.mds"
        path.write_bytes(b"x" * 100)
        os.utime(path, (number, number))
    listed = Path.glob

    def racing(self: Path, pattern: str) -> Iterator[Path]:
        found = sorted(listed(self, pattern))
        if found:
            found[0].unlink()  # By another process, between listing the folder and reading the file.
        return iter(found)

    monkeypatch.setattr(Path, "glob", racing)
    ShardCache(tmp_path, "", limit_bytes=300).make_room(100)
    monkeypatch.undo()
    # The first and second vanished while being counted; the third was evicted.
    assert [path.name for path in folder.iterdir()] == ["shard.00003.mds"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> str:
    """A store of the same shards, compressed."""
    folder = tmp_path_factory.mktemp("packed")
    recipe = make_recipe(folder / "shards", preparation=Preparation(zstd_level=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.text.mds.SHARD_BYTES", 2000)
        build_shards(recipe, documents=small_documents)
    upload_shards(folder / "shards", str(folder / "store"))
    return str(folder / "store")


def test_compressed_shards_stay_within_the_limit_and_the_disk(
    tmp_path: Path, packed: str, whole: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    limit = 8000
    cache, folder = cached(tmp_path / "cache", packed, limit)
    for number in np.random.default_rng(3).permutation(len(folder)).tolist():
        assert folder[number].tokens.tolist() == whole[number]
        assert cache._kept_bytes() <= limit
    assert not [path for path in (tmp_path / "cache").rglob("*.zstd*") if path.parent.name != ".locks"]
    writes, cache = Path.write_bytes, ShardCache(tmp_path / "cache", packed, None, HURRIED)

    def onto_small_disk(self: Path, content: bytes) -> int:
        if cache._kept_bytes() + len(content) > limit:
            writes(self, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writes(self, content)

    monkeypatch.setattr(Path, "write_bytes", onto_small_disk)
    assert all_tokens(ShardFolder(tmp_path / "cache/prose/train", cache)) == whole
    monkeypatch.setattr(ShardCache, "_evict", lambda *_: 0)
    with pytest.raises(UserError, match="is full and holds no shard to evict"):
        all_tokens(ShardFolder(tmp_path / "cache/prose/train", cache))


def test_a_compressed_shard_that_is_altered_or_another_is_named(tmp_path: Path, packed: str):
    shutil.copytree(packed, tmp_path / "store")
    path = tmp_path / "store/prose/train/shard.00000.mds.zstd"
    _, folder = cached(tmp_path / "cache", str(tmp_path / "store"))
    file, content = folder.file_of(0), path.read_bytes()
    assert file.packed is not None
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard\.00000\.mds\.zstd is altered: .*, also when fetched again"):
        folder[0]
    cache = ShardCache(tmp_path / "cache", str(tmp_path / "store"), None, HURRIED)
    for wrong, complaint in (
        (b"no zstd", "can't be unpacked"),
        (zstandard.compress(b"another"), "has 7 bytes instead of"),
    ):
        path.write_bytes(wrong)
        listed = dataclasses.replace(file.packed, bytes=len(wrong), sha256=None)
        with pytest.raises(UserError, match=rf"shard\.00000\.mds\.zstd .*{complaint}"):
            cache.fetch(dataclasses.replace(file, packed=listed))
        assert [it.name for it in (tmp_path / "cache/prose/train").iterdir()] == ["index.json"]


def test_processes_share_a_cache(tmp_path: Path, store: FaultyStore, whole: list[list[int]]):
    root, before = tmp_path / "cache", store.shard_reads
    folders = [cached(root, f"s3://{BUCKET}")[1] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(tokens == whole for tokens in pool.map(all_tokens, folders))
    assert store.shard_reads - before == len(list(root.glob("prose/train/*.mds")))


def test_another_store_in_the_same_folder_is_refused(
    tmp_path: Path, source: Recipe, built: Recipe, make_recipe: Callable[..., Recipe]
):
    ensure_shards(OpenedData(make_recipe(tmp_path / "cache", remote=source.data.shards)))
    with pytest.raises(UserError, match="caches other shards"):
        other = make_recipe(tmp_path / "other")
        build_shards(other, documents=lambda: list(small_documents())[:100])
        ensure_shards(OpenedData(make_recipe(tmp_path / "cache", remote=other.data.shards)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_a_store_as_it_reads_a_folder(
    tmp_path: Path, source: Recipe, make_recipe: Callable[..., Recipe], workers: int
):
    def batches(recipe: Recipe) -> list[list[list[int]]]:
        loader = iter(build_train_loader(open_data(recipe), rank=0, world_size=1))
        return [next(loader)["input_ids"].tolist() for _ in range(20)]

    remote = make_recipe(tmp_path / "cache", remote=source.data.shards, workers=workers, cache_bytes=8000)
    assert batches(remote) == batches(source)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_names_a_damaged_shard_in_one_line(
    tmp_path: Path, make_recipe: Callable[..., Recipe], workers: int
):
    recipe = make_recipe(tmp_path / "shards", workers=workers)
    build_shards(recipe, documents=small_documents)
    shard = tmp_path / "shards/code/train/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError) as error:
        next(iter(build_train_loader(OpenedData(recipe), rank=0, world_size=1)))
    assert str(error.value).startswith(f"data.shards: shard {shard} is altered")
    assert "\n" not in str(error.value)
