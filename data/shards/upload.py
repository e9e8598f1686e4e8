"""Shards to an object store, the manifest last, so that a store with a manifest has all that it names."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from data.shards.cache import AbsentError, Patience, ShardCache
from data.shards.index import file_fault, open_index
from data.shards.manifest import (
    MANIFEST_FILE,
    REBUILD,
    Manifest,
    check_shards,
    join_manifests,
)
from train.recipe.errors import UserError

KEY = "--upload"
AT_ONCE = 16
"""Files that are on their way: a store gives one connection little of what it can take."""


def upload_shards(root: Path, remote: str, join: bool = False) -> Manifest:
    """Copies a folder of shards to where ``data.remote`` finds it; what is there already is left alone.

    Of a shard that has a compressed form that form alone is sent. Every file is held to its hash before
    anything is sent; Streaming's uploaders try each twice. After a failure the same call sends the rest,
    where the store can be listed; until then there is no manifest, and so no folder of shards.

    Args:
        root: the folder on this machine.
        remote: address as ``data.remote`` takes it: ``s3://``, ``gs://``, ``dbfs:/Volumes/...``, a path.
        join: the domains join those that are there, and the store's manifest is of all of them.

    Returns:
        The store's manifest.

    Raises:
        UserError: if the store holds other shards, or does not take these.
    """
    manifest = check_shards(root, every_byte=True)
    remote = remote.rstrip("/")
    there = _manifest_at(remote)
    whole = join_manifests(manifest, there) if join and there else manifest
    if there is not None and there.digest == whole.digest:
        return there
    if there is not None and not join:
        what = f"{remote} holds other shards ({there.digest[:12]}) than {root} ({manifest.digest[:12]})"
        raise UserError(what, key=KEY, remedy="give another address, or --join if these are other domains")
    files = _files_before_the_manifest(root, manifest)
    if not urlsplit(remote).scheme:  # Streaming's uploader of paths makes no folders.
        for name in files:
            (Path(remote) / name).parent.mkdir(parents=True, exist_ok=True)
    from streaming.base.storage import CloudUploader

    try:
        uploader = CloudUploader.get((str(root), remote), keep_local=True, exist_ok=True)
        _send(root, remote, uploader, files, manifest.digest)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / MANIFEST_FILE).write_text(whole.to_json())
            last = CloudUploader.get((folder, remote), keep_local=True, exist_ok=True)
            last.upload_file(MANIFEST_FILE)
    except Exception as error:  # Each store's client has failures of its own.
        what = f"{remote} does not take the shards ({' '.join(str(error).split())[:200]})"
        raise UserError(what, key=KEY, remedy="the same command goes on") from None
    if _manifest_at(remote) != whole:
        raise UserError(
            f"{remote} does not give back what was sent", key=KEY, remedy="the same command sends it again"
        )
    return whole


def _files_before_the_manifest(root: Path, manifest: Manifest) -> list[Path]:
    """What the store needs, below ``root``.

    Raises:
        UserError: if a shard's compressed form is not what its index says.
    """
    splits = [root / name / side for name, domain in manifest.domains.items() for side in domain.splits]
    packed = [shard for folder in splits for shard in open_index(folder) if shard.packed]
    for shard in packed:
        assert shard.packed is not None
        if fault := file_fault(shard.packed.path, shard.packed.bytes, shard.packed.sha256):
            raise UserError(f"{shard.packed.path} {fault}", key="data.shards", remedy=REBUILD)
    left_out = {root / MANIFEST_FILE, *(shard.path for shard in packed)}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path not in left_out]
    names = [path.relative_to(root) for path in files]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def _send(root: Path, remote: str, uploader: Any, names: list[Path], digest: str) -> None:
    """Sends files, several at once, but those that an earlier call has sent and that are still there.

    Args:
        root: folder of the files.
        remote: where to.
        uploader: Streaming's.
        names: of the files below ``root``.
        digest: of the shards: what was sent of others does not count.
    """
    journal = root / f".sent-{hashlib.sha256(f'{digest} {remote}'.encode()).hexdigest()[:12]}"
    sent = set(journal.read_text().splitlines()) if journal.is_file() else set()
    sent &= _listed(remote, uploader) if sent else set()
    sizes = {name: (root / name).stat().st_size for name in map(Path.as_posix, names)}
    with (
        journal.open("a") as record,
        ThreadPoolExecutor(AT_ONCE) as pool,
        tqdm(total=sum(sizes.values()), desc=f"sending to {remote}", unit="B", unit_scale=True) as bar,
    ):
        bar.update(sum(size for name, size in sizes.items() if name in sent))
        is_over, faults = Event(), list[BaseException]()

        def send(name: str) -> str:
            if is_over.is_set():
                return ""
            try:
                uploader.upload_file(name)
            except BaseException:
                is_over.set()  # What is on its way arrives and is noted; nothing else is begun.
                raise
            return name

        try:
            for done in as_completed([pool.submit(send, name) for name in sizes if name not in sent]):
                if (fault := done.exception()) is not None:
                    faults.append(fault)
                elif name := done.result():
                    record.write(f"{name}\n")
                    record.flush()
                    bar.update(sizes[name])
        finally:  # Of an interrupt.
            is_over.set()
    if faults:
        raise faults[0]
    journal.unlink()


def _listed(remote: str, uploader: Any) -> set[str]:
    """Names of the files below an address; none where the store can't be listed."""
    if not urlsplit(remote).scheme:  # Streaming's uploader of paths lists where files come from.
        return {path.relative_to(remote).as_posix() for path in Path(remote).rglob("*")}
    try:
        keys = uploader.list_objects("") or []
    except NotImplementedError:
        return set()
    folder = urlsplit(remote).path.strip("/")
    return {key.removeprefix(f"{folder}/") for key in keys}


def _manifest_at(remote: str) -> Manifest | None:
    """The manifest in a store; None where there is none.

    Raises:
        UserError: if that can't be told, or it is damaged: what is there must not be overwritten.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return ShardCache(Path(folder), remote, patience=Patience(attempts=2)).fetch_manifest()
        except AbsentError:
            return None
