"""Licences of files in a tree: SPDX identifiers in them, or licence files in the folders above them.

A licence file is LICENSE, COPYING or UNLICENSE with any ending, or Debian's `copyright`, whose newer form
names a licence for each pattern of files (DEP-5). Others are told by phrases of their texts; where several
may hold, all do (AND), and a text that is not known gives no licence.
"""

import os
import re
from functools import lru_cache
from pathlib import Path

from data.text.licences import is_expression

_IN_FILE = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() \t-]{1,200})")
_SEARCHED = 3000
"""Characters of a file in which its own identifier is looked for."""
_NAMES = re.compile(r"(?:(?:un)?licen[cs]e|copying)(?:[.-].*)?|copyright", re.IGNORECASE)
_READ = 200_000
"""Bytes of a licence file that are read."""
_FOLDERS = 4096
"""Folders whose licence a process remembers."""
_DEBIAN = re.compile(r"^License:[ \t]*(\S[^\n]{0,200})", re.MULTILINE)
_COMMON = re.compile(r"/usr/share/common-licenses/([\w.-]{1,40}\w)")
_GNU = re.compile(r"(A?GPL|LGPL|GFDL)-?(\d)(\.\d)?(?:\.0)?(\+?)", re.IGNORECASE)
_DEBIAN_NAMES = {
    "gpl": "GPL-1.0-or-later",
    "lgpl": "LGPL-2.0-or-later",
    "gfdl": "GFDL-1.1-or-later",
    "expat": "MIT",
    "mit/x11": "MIT",
    "apache-2": "Apache-2.0",
    "artistic": "Artistic-1.0-Perl",
    "psf-2": "PSF-2.0",
    "cc0": "CC0-1.0",
    "bsd": "BSD-3-Clause",
    "mpl-1.1": "MPL-1.1",
    "public-domain": "LicenseRef-public-domain",
}
_BEGINNINGS = (
    ("gnu lesser general public license version 3", "LGPL-3.0-only"),
    ("gnu lesser general public license version 2.1", "LGPL-2.1-only"),
    ("gnu library general public license version 2", "LGPL-2.0-only"),
    ("gnu affero general public license version 3", "AGPL-3.0-only"),
    ("gnu general public license version 3", "GPL-3.0-only"),
    ("gnu general public license version 2", "GPL-2.0-only"),
    ("mozilla public license version 2.0", "MPL-2.0"),
    ("mozilla public license, version 2.0", "MPL-2.0"),
    ("eclipse public license - v 2.0", "EPL-2.0"),
)
"""Beginnings of licences that name others later on."""
_PHRASES = (
    ("apache license version 2.0", "Apache-2.0"),
    ("apache license, version 2.0", "Apache-2.0"),
    ("permission is hereby granted, free of charge, to any person obtaining a copy", "MIT"),
    ("permission to use, copy, modify, and/or distribute this software for any purpose", "ISC"),
    ("permission to use, copy, modify, and distribute this software for any purpose with or without", "ISC"),
    ("this is free and unencumbered software released into the public domain", "Unlicense"),
    ("cc0 1.0 universal", "CC0-1.0"),
    ("boost software license - version 1.0", "BSL-1.0"),
    ("altered source versions must be plainly marked as such", "Zlib"),
    ("python software foundation license version 2", "PSF-2.0"),
    ("attribution 4.0 international", "CC-BY-4.0"),
    ("attribution-sharealike 4.0 international", "CC-BY-SA-4.0"),
)
_BSD = "redistribution and use in source and binary forms"
_BEGINNING = 600
"""Characters in which a licence names itself."""


def licence_of_file(path: Path, folders: int, text: str) -> str:
    """Returns the licence of a file as an SPDX expression; empty if there is none, or none that is known.

    Args:
        path: the file.
        folders: how many folders above its own may have the licence file.
        text: the file's text.
    """
    if found := _IN_FILE.search(text[:_SEARCHED]):
        return found[1].strip(" \t-")
    folder = path.parent
    for _ in range(folders + 1):
        licence = _licence_of_folder(str(folder))
        if licence is not None:
            return licence
        folder = folder.parent
    return ""


def licence_of_text(text: str) -> str:
    """Returns the licence that a licence file grants as an SPDX expression; empty if it is not known."""
    if found := _IN_FILE.search(text[:_SEARCHED]):
        return found[1].strip(" \t-")
    if "copyright-format" in text[:_BEGINNING]:
        return _all_of([_of_debian(it) for it in _DEBIAN.findall(text)])
    words = " ".join(text.lower().split())
    named = [licence for phrase, licence in _BEGINNINGS if phrase in words[:_BEGINNING]]
    if named:
        return named[0]
    found_there = [licence for phrase, licence in _PHRASES if phrase in words]
    if _BSD in words:
        is_third = "neither the name" in words or "may not be used to endorse" in words
        found_there.append("BSD-3-Clause" if is_third else "BSD-2-Clause")
    return _all_of(found_there or [_of_debian(it) for it in _COMMON.findall(text)])


@lru_cache(maxsize=_FOLDERS)
def _licence_of_folder(folder: str) -> str | None:
    """The licence that the files of a folder name; None if it has no licence file."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(it.name for it in entries if _NAMES.fullmatch(it.name) and it.is_file())
        if not names:
            return None
        found = []
        for name in names:
            with (Path(folder) / name).open("rb") as stream:
                found.append(licence_of_text(stream.read(_READ).decode("utf-8", "replace")))
    except OSError:
        return None
    # One that is not known may ask for anything.
    return _all_of(found) if all(found) else ""


def _all_of(licences: list[str]) -> str:
    each = dict.fromkeys(it for it in licences if it)
    return " AND ".join(f"({it})" if " OR " in it and len(each) > 1 else it for it in each)


def _of_debian(words: str) -> str:
    """Debian's names of licences as an SPDX expression."""
    made = []
    for word in words.replace(",", " ").split():
        bare = word.strip("()|;.").lower()
        if bare in ("or", "and", "with"):
            made.append(bare.upper())
        elif bare == "exception" and made:
            made[-1] += "-exception"
        elif made and made[-1] == "WITH":
            made.append(word.strip("()|;."))
        elif gnu := _GNU.fullmatch(bare):
            kind = "or-later" if gnu[4] else "only"
            made.append(f"{gnu[1].upper()}-{gnu[2]}{gnu[3] or '.0'}-{kind}")
        else:
            made.append(_DEBIAN_NAMES.get(bare) or _reference(word.strip("()|;.")))
    return " ".join(made)


def _reference(name: str) -> str:
    """An SPDX identifier as it is; another name as SPDX spells what is not in its list."""
    if is_expression(name):
        return name
    return f"LicenseRef-{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-') or 'unnamed'}"
