"""Fetches sources from an object store to the work folder, with Streaming's downloaders.

The files of a source are listed once. Fetching is a stage like any other, so all processes or nodes fetch in
parallel, and an interrupted job does not fetch files again.
"""

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from data.shards.cache import ShardCache
from data.text.engines import Engine
from data.text.inputs import is_fetched, is_remote, match, report_passed_over
from data.text.job import PreparationJob, Result
from train.recipe.errors import UserError
from train.recipe.preparation import Source

FOLDER = "inputs"
MOST_TASKS = 10_000
"""With more files than this, each task fetches several."""


@dataclass(frozen=True)
class Fetch:
    """The files that one task fetches."""

    source: int
    """Index of their source in the recipe."""
    base: str
    """Their folder in the store."""
    names: tuple[str, ...]


def fetch_sources(job: PreparationJob, engine: Engine) -> dict[int, dict[str, Path]]:
    """Fetches the files of all sources that are in a store, unless already fetched.

    Returns:
        For each such source, by its index in the recipe: local files by name relative to its folder.

    Raises:
        UserError: if a store does not list or provide them.
    """
    places: dict[int, dict[str, Path]] = {}
    tasks: list[Fetch] = []
    for n, source in enumerate(job.sources):
        if is_remote(source.path):
            base, names = _addresses(n, source)
            folder = _folder(job, base)
            places[n] = {name: folder / name for name in names}
            size = max(1, -(-len(names) // MOST_TASKS))
            tasks += [Fetch(n, base, tuple(names[at : at + size])) for at in range(0, len(names), size)]
    results = engine.run("fetching sources", fetch, job, tasks) if tasks else []
    for task, result in zip(tasks, results, strict=True):
        if result["error"]:
            raise _refused(task.source, result["error"])
    return places


def fetch(job: PreparationJob, task: Fetch) -> Result:
    """Fetches a task's files, with retries.

    Returns:
        ``error``: the store's answer if it did not provide a file; empty otherwise.
    """
    folder = _folder(job, task.base)
    cache = ShardCache(folder, task.base)
    try:
        for name in task.names:
            cache.require(folder / name, None)
    except UserError as error:  # Returned as a result, since engines report exceptions differently.
        return {"error": error.what}
    return {"error": ""}


def _folder(job: PreparationJob, base: str) -> Path:
    """The local folder for the files of a folder in a store."""
    return job.work / FOLDER / hashlib.sha256(base.encode()).hexdigest()[:12]


def _addresses(n: int, source: Source) -> tuple[str, list[str]]:
    """The folder of a source in the store, and the names of its files below it."""
    path = source.path.rstrip("/")
    if Path(path).suffix and not glob.has_magic(path):
        base, _, name = path.rpartition("/")
        return base, [name]
    from streaming.base.storage import CloudUploader

    signs = [path.index(sign) for sign in "*?[" if sign in path]
    base = (path[: min(signs)] if signs else f"{path}/").rpartition("/")[0]
    try:
        keys = CloudUploader.get(base, exist_ok=True).list_objects("")
    except Exception as error:  # Each store's client has its own exceptions.
        raise _refused(n, f"{base} can't be listed ({' '.join(str(error).split())[:150]})") from None
    if keys is None:
        raise _refused(n, f"{base}: Streaming can't list this store; name a file in each source")
    parts = urlsplit(base)
    names = [f"{parts.scheme}://{parts.netloc}/{key}" for key in keys]
    found = sorted(name.removeprefix(f"{base}/") for name in names if match(name, path))
    report_passed_over(found, source.kind, f"data.sources[{n}].path")
    return base, [name for name in found if is_fetched(name, source.kind)]


def _refused(n: int, what: str) -> UserError:
    return UserError(what, key=f"data.sources[{n}].path", remedy="correct the address")
