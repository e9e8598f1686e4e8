"""Shards to an object store, the manifest last, so that a store with a manifest has all that it names."""

import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data.manifest import (
    MANIFEST_FILE,
    REBUILD,
    Manifest,
    check_shards,
    file_fault,
    read_manifest,
    shard_files,
)
from data.shard_cache import Patience, ShardCache
from train.recipe import RecipeError

KEY = "--upload"


def upload_shards(root: Path, remote: str) -> Manifest:
    """Copies a folder of shards to where ``data.remote`` finds it; what is there already is left alone.

    Of a shard that has a compressed form that form alone is sent. Every file is held to its hash before
    anything is sent; Streaming's uploaders try each twice. After a failure the same call sends them again;
    until then there is no manifest, and so no folder of shards.

    Args:
        root: the folder on this machine.
        remote: address as ``data.remote`` takes it: ``s3://``, ``gs://``, ``dbfs:/Volumes/...``, a path.

    Raises:
        RecipeError: if the store holds other shards, or does not take these.
    """
    manifest = check_shards(root, every_byte=True)
    remote = remote.rstrip("/")
    there = _digest_at(remote)
    if there == manifest.digest:
        return manifest
    if there is not None:
        what = f"{remote} holds other shards ({there[:12]}) than {root} ({manifest.digest[:12]})"
        raise RecipeError(what, key=KEY, remedy="give another address, or empty that one")
    ordered = [*_files_before_the_manifest(root, manifest), Path(MANIFEST_FILE)]
    if not urlsplit(remote).scheme:  # Streaming's uploader of paths makes no folders.
        for name in ordered:
            (Path(remote) / name).parent.mkdir(parents=True, exist_ok=True)
    from streaming.base.storage import CloudUploader

    try:
        uploader = CloudUploader.get((str(root), remote), keep_local=True, exist_ok=True)
        for name in tqdm(ordered, f"sending to {remote}", unit="file", mininterval=1):
            uploader.upload_file(name.as_posix())
    except Exception as error:  # Each store's client has failures of its own.
        what = f"{remote} does not take the shards ({' '.join(str(error).split())[:200]})"
        raise RecipeError(what, key=KEY, remedy="the same command sends them again") from None
    if _digest_at(remote) != manifest.digest:
        raise RecipeError(
            f"{remote} does not give back what was sent", key=KEY, remedy="the same command sends it again"
        )
    return manifest


def _files_before_the_manifest(root: Path, manifest: Manifest) -> list[Path]:
    """What the store needs, below ``root``.

    Raises:
        RecipeError: if a shard's compressed form is not what its index says.
    """
    splits = [root / name / side for name, domain in manifest.domains.items() for side in domain.splits]
    packed = [shard for folder in splits for shard in shard_files(folder) if shard.packed]
    for shard in packed:
        assert shard.packed is not None
        if fault := file_fault(shard.packed.path, shard.packed.bytes, shard.packed.sha256):
            raise RecipeError(f"{shard.packed.path} {fault}", key="data.shards", remedy=REBUILD)
    left_out = {root / MANIFEST_FILE, *(shard.path for shard in packed)}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path not in left_out]
    names = [path.relative_to(root) for path in files]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def _digest_at(remote: str) -> str | None:
    """Digest of the manifest in a store; None where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ShardCache(Path(folder), remote, patience=Patience(attempts=2)).fetch_manifest()
        except RecipeError:
            return None
        return read_manifest(Path(folder)).digest
