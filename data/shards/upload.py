"""Uploads shards to an object store, the manifest last, so that a store with a manifest is complete."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from data.shards.cache import AbsentError, Patience, ShardCache
from data.shards.index import file_mismatch, open_index
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
"""Files sent in parallel: one connection uses little of a store's bandwidth."""


def upload_shards(root: Path, remote: str, join: bool = False) -> Manifest:
    """Copies a folder of shards to an address for ``data.remote``; files already there are kept.

    If a shard has a compressed file, only that is sent. Every file's hash is checked before anything is sent;
    Streaming's uploaders try each file twice. After a failure the same call sends the rest, if the store can
    be listed; until it succeeds the store has no manifest, so its files don't count as shards.

    Args:
        root: the folder on this machine.
        remote: address as in ``data.remote``: ``s3://``, ``gs://``, ``dbfs:/Volumes/...``, a path.
        join: add the domains to those in the store; the store's manifest then lists all of them.

    Returns:
        The store's manifest.

    Raises:
        UserError: if the store holds other shards, or does not accept these.
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
    if not urlsplit(remote).scheme:  # Streaming's uploader for paths does not create folders.
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
    except Exception as error:  # Each store's client has its own exceptions.
        what = f"{remote} does not accept the shards ({' '.join(str(error).split())[:200]})"
        raise UserError(what, key=KEY, remedy="the same command sends the rest") from None
    if _manifest_at(remote) != whole:
        raise UserError(
            f"{remote} does not return what was sent", key=KEY, remedy="the same command sends it again"
        )
    return whole


def _files_before_the_manifest(root: Path, manifest: Manifest) -> list[Path]:
    """Lists the files that the store needs, relative to ``root``.

    Raises:
        UserError: if a compressed shard does not match its index.
    """
    splits = [root / name / side for name, domain in manifest.domains.items() for side in domain.splits]
    packed = [shard for folder in splits for shard in open_index(folder) if shard.packed]
    for shard in packed:
        assert shard.packed is not None
        if mismatch := file_mismatch(shard.packed.path, shard.packed.bytes, shard.packed.sha256):
            raise UserError(f"{shard.packed.path} {mismatch}", key="data.shards", remedy=REBUILD)
    not_sent = {root / MANIFEST_FILE, *(shard.path for shard in packed)}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path not in not_sent]
    names = [path.relative_to(root) for path in files]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def _send(root: Path, remote: str, uploader: Any, names: list[Path], digest: str) -> None:
    """Sends files in parallel, except those that an earlier call has sent and that are still in the store.

    Args:
        root: folder of the files.
        remote: address to send them to.
        uploader: Streaming's uploader.
        names: names of the files, relative to ``root``.
        digest: digest of the shards; files sent for other shards don't count.
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
        is_over, errors = Event(), list[BaseException]()

        def send(name: str) -> str:
            if is_over.is_set():
                return ""
            try:
                uploader.upload_file(name)
            except BaseException:
                is_over.set()  # Uploads in progress finish and are recorded; no new ones start.
                raise
            return name

        try:
            for done in as_completed([pool.submit(send, name) for name in sizes if name not in sent]):
                if (error := done.exception()) is not None:
                    errors.append(error)
                elif name := done.result():
                    record.write(f"{name}\n")
                    record.flush()
                    bar.update(sizes[name])
        finally:  # After an interrupt too.
            is_over.set()
    if errors:
        raise errors[0]
    journal.unlink()


def _listed(remote: str, uploader: Any) -> set[str]:
    """Names of the files below an address; empty if the store can't be listed."""
    if not urlsplit(remote).scheme:  # Streaming's uploader for paths lists the source folder.
        return {path.relative_to(remote).as_posix() for path in Path(remote).rglob("*")}
    try:
        keys = uploader.list_objects("") or []
    except NotImplementedError:
        return set()
    folder = urlsplit(remote).path.strip("/")
    return {key.removeprefix(f"{folder}/") for key in keys}


def _manifest_at(remote: str) -> Manifest | None:
    """The manifest in a store; None if there is none.

    Raises:
        UserError: if the store can't be read or its manifest is damaged: it must not be overwritten.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return ShardCache(Path(folder), remote, patience=Patience(attempts=2)).fetch_manifest()
        except AbsentError:
            return None
