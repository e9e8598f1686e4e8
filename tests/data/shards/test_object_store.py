"""Sources and shards in an object store: moto's S3, and a fake of Unity Catalog's files API."""

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data.loader import build_train_loader
from data.opened import OpenedData, open_data
from data.shards.cache import ShardCache
from data.shards.manifest import Manifest, check_shards
from data.shards.streams import ShardFolder
from data.shards.upload import upload_shards
from data.text.installed import CorpusDocument
from data.write_shards import build_shards, ensure_shards, main
from tests.data.conftest import small_documents
from train.recipe.errors import UserError
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import Recipe, Tokenizer, TokenizerKind

pytestmark = pytest.mark.slow

FACTS = {"dataset": "tales", "version": "1", "origin": "https://example.org", "licence": "CC0-1.0"}
VOLUME = "/Volumes/main/pretraining/shards"


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server that Streaming uses too; it has the bucket `store`."""
    pytest.importorskip("flask")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("S3_ENDPOINT_URL", address)
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="store")
        yield client
    server.stop()


def ensured(recipe: Recipe) -> Manifest:
    opened = OpenedData(recipe)
    ensure_shards(opened)
    return opened.manifest


def sources_of(folder: str) -> list[Source]:
    return [
        Source("code", SourceKind.jsonl, f"{folder}/code", **FACTS),  # type: ignore[arg-type]
        Source("prose", SourceKind.jsonl, f"{folder}/prose-*.jsonl", **FACTS),  # type: ignore[arg-type]
    ]


def test_sources_in_a_store_give_the_shards_of_the_same_files_here(
    s3: Any, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    texts: dict[str, list[str]] = {"code/a.jsonl": [], "code/deep/b.jsonl": [], "prose-1.jsonl": []}
    for number, document in enumerate(small_documents()):
        name = (
            "prose-1.jsonl"
            if document.domain == "prose"
            else ("code/a.jsonl", "code/deep/b.jsonl")[number % 2]
        )
        texts[name].append(json.dumps({"text": document.text}) + "\n")
    texts["prose-notes.txt"] = texts["code/notes.txt"] = ["not asked for"]
    for name, lines in texts.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("".join(lines))
        s3.put_object(Bucket="store", Key=f"texts/{name}", Body="".join(lines).encode())
    here = make_recipe(tmp_path / "here", sources=sources_of(str(tmp_path / "texts")))
    there = make_recipe(tmp_path / "there", sources=sources_of("s3://store/texts"))
    assert build_shards(there).digest == build_shards(here).digest
    missing = make_recipe(tmp_path / "none", sources=sources_of("s3://store/nowhere"))
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.path: s3://store/nowhere/code has no file"):
        build_shards(missing)
    sources = sources_of("s3://store/texts")
    sources[1] = dataclasses.replace(sources[1], path="s3://store/texts/prose-2.jsonl")
    with pytest.raises(
        UserError, match=r"data\.sources\[1\]\.path: s3://store/texts/prose-2\.jsonl .*not found"
    ):
        build_shards(make_recipe(tmp_path / "none", sources=sources))


def test_a_job_that_was_cut_off_fetches_no_source_again_and_reads_no_other_jobs_sources(
    s3: Any, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": document.text}) for document in small_documents()]
    for name, part in {"one/a": lines[:60], "one/b": lines[60:], "two/a": lines[::2]}.items():
        s3.put_object(Bucket="store", Key=f"cut-off/{name}.jsonl", Body="\n".join(part).encode())
    s3.put_object(Bucket="store", Key="cut-off/one/notes.txt", Body=b"not asked for")

    def recipe_of(folder: str, shards: str) -> Recipe:
        source = Source("code", SourceKind.jsonl, f"s3://store/cut-off/{folder}", **FACTS)  # type: ignore[arg-type]
        return make_recipe(tmp_path / shards, sources=[source], domains={"code": 1.0})

    def failing(*_: object) -> None:
        raise OSError("power")

    wanted = {folder: build_shards(recipe_of(folder, f"whole-{folder}")).digest for folder in ("one", "two")}
    for folder in ("two", "one"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
            patch.setattr("data.text.build.decide", failing)
            build_shards(recipe_of(folder, "shards"))
    fetched = (tmp_path / ".shards.partial/inputs").glob("*/*.*")
    assert sorted(path.name for path in fetched if path.is_file()) == ["a.jsonl", "a.jsonl", "b.jsonl"]
    s3.put_object(Bucket="store", Key="cut-off/one/a.jsonl", Body=b"not read again")
    assert build_shards(recipe_of("one", "shards")).digest == wanted["one"] != wanted["two"]


def test_uploaded_shards_are_trained_on_as_those_here(
    s3: Any, tmp_path: Path, built: Recipe, make_recipe: Callable[..., Recipe]
) -> None:
    root = Path(built.data.shards)
    manifest = upload_shards(root, "s3://store/shards/")
    objects = s3.list_objects_v2(Bucket="store", Prefix="shards/")["Contents"]
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {it["Key"].removeprefix("shards/") for it in objects} == files
    recipe = make_recipe(tmp_path / "cache", remote="s3://store/shards")
    assert ensured(recipe).digest == manifest.digest
    ours, theirs = (build_train_loader(open_data(it), rank=0, world_size=1) for it in (built, recipe))
    for one, other, _ in zip(ours, theirs, range(20), strict=False):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert upload_shards(root, "s3://store/shards").digest == manifest.digest  # Nothing is sent again.
    check_shards(root)


def test_other_shards_in_the_store_are_never_overwritten(
    s3: Any, tmp_path: Path, built: Recipe, make_recipe: Callable[..., Recipe]
) -> None:
    root = Path(built.data.shards)
    upload_shards(root, "s3://store/mine")
    other = make_recipe(tmp_path / "other", sequence_tokens=64)
    build_shards(other, documents=small_documents)
    with pytest.raises(UserError, match="--upload: s3://store/mine holds other shards"):
        upload_shards(Path(other.data.shards), "s3://store/mine")
    with pytest.raises(UserError, match="--upload: s3://nowhere/x does not accept the shards"):
        upload_shards(root, "s3://nowhere/x")


def test_shards_are_copied_to_a_path_and_what_is_missing_there_again(
    tmp_path: Path, built: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streaming.base.storage.upload import LocalUploader

    root, mounted = tmp_path / "shards", tmp_path / "mounted/shards"
    shutil.copytree(built.data.shards, root)
    copies, copied = LocalUploader.upload_file, list[str]()

    def failing(self: Any, name: str) -> None:
        if name == "prose/validation/index.json" and name not in copied:
            copied.append(name)
            raise OSError("cable")
        copied.append(name)
        copies(self, name)

    monkeypatch.setattr(LocalUploader, "upload_file", failing)
    monkeypatch.setattr("data.shards.upload.AT_ONCE", 1)
    with pytest.raises(UserError, match=r"mounted/shards does not accept the shards .*cable"):
        upload_shards(root, str(mounted))
    (mounted / "code/documents.jsonl").unlink()
    before = len(copied)
    upload_shards(root, str(mounted))
    again = set(copied[before:]) & set(copied[:before])
    assert again == {"code/documents.jsonl", "prose/validation/index.json"}
    assert check_shards(mounted).digest == check_shards(root).digest


def test_a_store_without_a_manifest_holds_no_shards(
    s3: Any, tmp_path: Path, built: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streaming.base.storage.upload import S3Uploader

    root = tmp_path / "shards"
    shutil.copytree(built.data.shards, root)
    (root / ".locks").mkdir()
    (root / ".locks/mine").touch()
    sends, fails_at = S3Uploader.upload_file, "prose/validation/index.json"

    def failing(self: Any, name: str) -> None:
        if name == fails_at:
            raise OSError("cable")
        sent.append(name)
        if name != loses:
            sends(self, name)

    monkeypatch.setattr(S3Uploader, "upload_file", failing)
    monkeypatch.setattr("data.shards.upload.AT_ONCE", 1)
    sent, loses = list[str](), ""
    with pytest.raises(UserError, match=r"--upload: s3://store/cut does not accept the shards .*cable"):
        upload_shards(root, "s3://store/cut")
    names = {it["Key"] for it in s3.list_objects_v2(Bucket="store", Prefix="cut/")["Contents"]}
    assert "cut/code/train/shard.00000.mds" in names and "cut/manifest.json" not in names
    assert "cut/prose/validation/shard.00000.mds" not in names  # Nothing was started after the failure.
    s3.delete_object(Bucket="store", Key="cut/code/train/index.json")
    before, fails_at, loses = [*sent], "", "manifest.json"
    with pytest.raises(UserError, match="--upload: s3://store/cut does not return what was sent"):
        upload_shards(root, "s3://store/cut")
    again = set(sent[len(before) :]) & set(before)
    assert len(before) > 5 and again == {"code/train/index.json"}  # Nothing else was sent twice.
    loses = ""
    upload_shards(root, "s3://store/cut")
    names = {it["Key"] for it in s3.list_objects_v2(Bucket="store", Prefix="cut/")["Contents"]}
    wanted = {path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts}
    assert names == {f"cut/{path.relative_to(root).as_posix()}" for path in wanted}


def test_domains_join_those_in_the_store(
    s3: Any,
    tmp_path: Path,
    built: Recipe,
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from streaming.base.storage.download import S3Downloader

    def made(name: str, domains: dict[str, str], **changes: Any) -> Path:
        """Shards with some of the domains, by the names of their texts."""
        recipe = make_recipe(tmp_path / name, domains=dict.fromkeys(domains.values(), 1.0), **changes)
        renamed = [
            CorpusDocument(domains[it.domain], it.name, it.text)
            for it in small_documents()
            if it.domain in domains
        ]
        recipe = dataclasses.replace(recipe, tokenizer=Tokenizer(TokenizerKind.cl100k_base))
        build_shards(recipe, documents=lambda: iter(renamed))
        return Path(recipe.data.shards)

    both = make_recipe(tmp_path / "cache", remote="s3://store/parts")
    both = dataclasses.replace(both, tokenizer=Tokenizer(TokenizerKind.cl100k_base))
    upload_shards(made("first", {"code": "code"}), "s3://store/parts", join=True)
    alone = dataclasses.replace(both, data=dataclasses.replace(both.data, domains={"code": 1.0}))
    ensured(alone)
    node = dataclasses.replace(alone, data=dataclasses.replace(alone.data, shards=str(tmp_path / "node")))
    open_data(node)
    second = made("second", {"prose": "prose"})
    with pytest.raises(UserError, match=r"holds other shards .* or --join if these are other domains"):
        upload_shards(second, "s3://store/parts")

    def failing(*_: object) -> None:
        raise OSError("cable")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"manifest\.json .*cable"):
        patch.setattr(S3Downloader, "_download_file_impl", failing)
        upload_shards(second, "s3://store/parts", join=True)
    manifest = upload_shards(second, "s3://store/parts", join=True)
    assert sorted(manifest.domains) == ["code", "prose"]
    assert upload_shards(second, "s3://store/parts", join=True) == manifest
    # An older cache still works; its shards equal those of a new cache.
    assert ensured(both) == manifest
    at_once = make_recipe(made("at-once", {"code": "code", "prose": "prose"}))
    at_once = dataclasses.replace(at_once, tokenizer=both.tokenizer)
    # So does the cache of a node that has not fetched the manifest since.
    node = dataclasses.replace(both, data=dataclasses.replace(both.data, shards=node.data.shards))
    loaders = (build_train_loader(open_data(it), rank=0, world_size=1) for it in (at_once, both, node))
    for one, other, another, _ in zip(*loaders, range(20), strict=False):
        assert one["input_ids"].tolist() == other["input_ids"].tolist() == another["input_ids"].tolist()
    with pytest.raises(
        UserError, match=r"data\.domains: code there differs from code here; give each domain"
    ):
        upload_shards(made("third", {"prose": "code"}), "s3://store/parts", join=True)
    with pytest.raises(UserError, match="sequence_tokens: is 32 there, and 64 here"):
        upload_shards(made("longer", {"prose": "x"}, sequence_tokens=64), "s3://store/parts", join=True)


def test_altered_shards_are_not_sent(s3: Any, tmp_path: Path, built: Recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.shards.manifest.HASHED_BYTES", 0)
    root = tmp_path / "shards"
    shutil.copytree(built.data.shards, root)
    shard = root / "code/train/shard.00000.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=re.escape(f"{shard} is altered")):
        upload_shards(root, "s3://store/altered")
    assert "Contents" not in s3.list_objects_v2(Bucket="store", Prefix="altered/")


def test_compressed_shards_are_sent_in_place_of_the_others_and_unpacked_by_each_node(
    s3: Any, tmp_path: Path, built: Recipe, make_recipe: Callable[..., Recipe]
) -> None:
    from streaming import StreamingDataset

    made = make_recipe(tmp_path / "made", preparation=Preparation(zstd_level=3))
    root = Path(made.data.shards)
    manifest = build_shards(made, documents=small_documents)
    before = check_shards(Path(built.data.shards)).domains
    for name, domain in manifest.domains.items():
        for side, split in domain.splits.items():
            assert split.content_sha256 == before[name].splits[side].content_sha256
    upload_shards(root, "s3://store/packed")
    names = [it["Key"] for it in s3.list_objects_v2(Bucket="store", Prefix="packed/")["Contents"]]
    assert "packed/code/train/shard.00000.mds.zstd" in names
    assert not any(name.endswith(".mds") for name in names)
    # Shards are the same whether the recipe compresses them or not.
    recipe = make_recipe(tmp_path / "cache", remote="s3://store/packed")
    assert ensured(recipe).digest == manifest.digest
    ours, theirs = (build_train_loader(open_data(it), rank=0, world_size=1) for it in (built, recipe))
    for one, other, _ in zip(ours, theirs, range(20), strict=False):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert {path.suffix for path in (tmp_path / "cache/code/train").iterdir()} == {".mds", ".json"}
    # Streaming can read them too.
    streamed = StreamingDataset(
        remote="s3://store/packed/code/train", local=str(tmp_path / "streamed"), batch_size=1
    )
    folder = ShardFolder(root / "code/train")
    assert len(streamed) == len(folder)
    assert streamed[1]["tokens"].tolist() == folder[1].tokens.tolist()
    packed = root / "code/train/shard.00000.mds.zstd"
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(UserError, match=re.escape(f"{packed} has ") + ".* instead of"):
        upload_shards(root, "s3://store/packed-again")


def test_the_command_uploads(
    s3: Any, tmp_path: Path, built: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    smoke = Path(__file__).parents[3] / "yamls/smoke.yaml"
    tokenizer = "tokenizer: { vocab_size: 300 }\nmodel: { vocab_size: 300 }\n"
    data = f"data: {{ corpus: null, shards: {built.data.shards}, sequence_tokens: 32 }}\n"
    recipe.write_text(f"extends: {smoke}\n{tokenizer}{data}")
    assert main([str(recipe), "--upload"]) == 2
    assert (
        "--upload: no address to upload the shards to; give one, or set data.remote"
        in capsys.readouterr().err
    )
    assert main([str(recipe), "--join"]) == 2
    assert "--join: needs --upload" in capsys.readouterr().err
    assert main([str(recipe), "data.remote=s3://store/by-command", "--upload"]) == 0
    assert ShardCache(tmp_path / "c", "s3://store/by-command").fetch_manifest() == check_shards(
        Path(built.data.shards)
    )


@pytest.fixture
def volume(built: Recipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server of Databricks' files API for the shards, and the requests in order."""
    pytest.importorskip("databricks.sdk")
    root, asked = Path(built.data.shards), list[str]()

    class AskedHandler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            asked.append(self.path)
            file = root / self.path.removeprefix(f"/api/2.0/fs/files{VOLUME}/")
            is_there = self.path.startswith("/api/2.0/fs/files") and file.is_file()
            body = file.read_bytes() if is_there else b'{"error_code": "NOT_FOUND", "message": "none"}'
            self.send_response(200 if is_there else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/octet-stream" if is_there else "application/json")
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), AskedHandler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DATABRICKS_TOKEN", "secret")
    yield asked
    server.shutdown()


def test_shards_in_a_volume_of_unity_catalog_are_read(
    volume: list[str], tmp_path: Path, built: Recipe, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(tmp_path / "cache", remote=f"dbfs:{VOLUME}")
    assert ensured(recipe).digest == check_shards(Path(built.data.shards)).digest
    ours, theirs = (build_train_loader(open_data(it), rank=0, world_size=1) for it in (built, recipe))
    for one, other, _ in zip(ours, theirs, range(5), strict=False):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert any(path.endswith("shard.00000.mds") for path in volume)
