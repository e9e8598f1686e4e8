"""Brings sources from an object store to the work folder, by the downloaders that Streaming has."""

import glob
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data.prepare.inputs import match
from data.shard_cache import ShardCache
from train.preparation_schema import Source
from train.recipe import RecipeError


def fetch_source(folder: Path, n: int, source: Source) -> Path:
    """Fetches what is not there yet, with retries; returns the folder.

    Args:
        folder: where to.
        n: the source's place in the recipe.
        source: its path is an address.

    Raises:
        RecipeError: if the store does not list or give the files.
    """
    try:
        base, names = _addresses(source.path.rstrip("/"))
        cache = ShardCache(folder, base)
        for name in tqdm(names, desc=f"fetching {source.path}", unit="file", mininterval=1):
            cache.require(folder / name, None)
    except RecipeError as error:
        raise RecipeError(error.what, key=f"data.sources[{n}].path", remedy="correct the address") from None
    return folder


def _addresses(path: str) -> tuple[str, list[str]]:
    """The folder in the store and the files below it that a path means."""
    if Path(path).suffix and not glob.has_magic(path):
        base, _, name = path.rpartition("/")
        return base, [name]
    from streaming.base.storage import CloudUploader

    base = (
        path[: min(path.index(sign) for sign in "*?[" if sign in path)]
        if glob.has_magic(path)
        else f"{path}/"
    )
    base = base.rpartition("/")[0]
    try:
        keys = CloudUploader.get(base, exist_ok=True).list_objects("")
    except Exception as error:  # Each store's client has failures of its own.
        raise RecipeError(f"{base} can't be listed ({' '.join(str(error).split())[:150]})") from None
    if keys is None:
        raise RecipeError(f"{base}: Streaming can't list this store; name a file in each source")
    parts = urlsplit(base)
    names = [f"{parts.scheme}://{parts.netloc}/{key}" for key in keys]
    return base, sorted(name.removeprefix(f"{base}/") for name in names if match(name, path))
