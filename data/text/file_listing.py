"""The files that a path, a folder or a pattern means, each under a name of its own."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

_NAMED = 3
"""Names in a message, which says how many more there are."""


def files_of(path: str) -> dict[str, Path]:
    """Files of a local path or pattern, by name relative to its folder; of a pattern, to its fixed part.

    Files of the same name in several folders stay apart, and one that a pattern matches twice, by itself and
    in a folder, is listed once. What exists under the path as it is written is never taken for a pattern.
    """
    place = Path(path)
    if place.is_file():
        return {place.name: place}
    if place.is_dir():
        return {str(file.relative_to(place)): file for file in walk_files(place)}
    base = _fixed_part(path)
    found = [Path(it) for it in glob.iglob(path, recursive=True)]  # noqa: PTH207  (may be absolute)
    files = (file for it in found for file in (walk_files(it) if it.is_dir() else (it,)))
    return {str(file.relative_to(base)): file for file in files}


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields everything below a folder that is no folder; links to folders are followed, but not in circles.

    Raises:
        OSError: if a folder can't be listed.
    """
    yield from map(Path, _walk(str(folder), (os.path.realpath(folder),)))


def named(names: list[str]) -> str:
    """Returns the first names and how many more there are, for a message."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if not entry.is_dir():
            yield entry.path
        elif not entry.is_symlink():
            yield from _walk(entry.path, (*above, entry.path))
        elif (real := os.path.realpath(entry.path)) not in map(os.path.realpath, above):
            yield from _walk(entry.path, (*above, real))


def _fixed_part(pattern: str) -> Path:
    """The folders of a pattern before the first wildcard."""
    parts = Path(pattern).parts
    varying = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[: min(varying, len(parts) - 1)])
