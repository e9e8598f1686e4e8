"""Wheels packed again, a fifth smaller, and the list of them that pip installs from.

Wheels come deflated. pip reads them with Python's ``zipfile``, which also knows LZMA. The files inside stay
as they were, and so does the list of their hashes in every wheel (``RECORD``), but the wheel itself gets
another hash: the list names both. Called by ``launch/wheels.sh``, with nothing but Python's own library at
hand.
"""

import hashlib
import os
import re
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def repack(wheel: Path) -> str:
    """Packs a wheel's files with LZMA where that makes it smaller, in place.

    The same wheel always gives the same bytes, with the same version of Python's ``zipfile`` and liblzma.

    Returns:
        SHA-256 of the wheel as it came, in hex.
    """
    published = hashlib.sha256(wheel.read_bytes()).hexdigest()
    packed = wheel.with_suffix(".packed")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as target:
        for entry in source.infolist():
            copy = zipfile.ZipInfo(entry.filename, entry.date_time)
            copy.external_attr = entry.external_attr
            # LZMA's header costs more than it saves on the smallest files.
            copy.compress_type = zipfile.ZIP_LZMA if entry.file_size > 1_000 else zipfile.ZIP_DEFLATED
            target.writestr(copy, source.read(entry))
    if packed.stat().st_size < wheel.stat().st_size:
        packed.replace(wheel)
    else:
        packed.unlink()
    return published


def lines(requirements: str, wheels: dict[str, Path], published: dict[str, str]) -> list[str]:
    """Lines of a list that pip installs from with ``--require-hashes``: each wheel's name, version, SHA-256.

    Args:
        requirements: text with lines that begin with ``NAME==VERSION``.
        wheels: the wheel of each name, as PEP 503 normalises it.
        published: SHA-256 of each name's wheel before it was packed again.
    """
    made = []
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", requirements, re.MULTILINE):
        key = normalised(name)
        now = hashlib.sha256(wheels[key].read_bytes()).hexdigest()
        made.append(f"{name}=={version} --hash=sha256:{now}")
        if now != published[key]:
            made[-1] += f"  # packed again; as published: {published[key]}"
    return made


def normalised(name: str) -> str:
    """Name of a package as PEP 503 compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def main(folder: Path, lists: list[Path]) -> None:
    """Packs a folder's wheels again and writes a list there for each list of requirements, under its name."""
    wheels = {normalised(path.name.split("-")[0]): path for path in sorted(folder.glob("*.whl"))}
    largest_first = sorted(wheels, key=lambda name: -wheels[name].stat().st_size)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        published = dict(
            zip(largest_first, pool.map(repack, [wheels[name] for name in largest_first]), strict=True)
        )
    for path in lists:
        (folder / path.name).write_text("\n".join([*lines(path.read_text(), wheels, published), ""]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
