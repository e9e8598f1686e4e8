"""Real text that every installation has: code and prose of Python and the installed packages.

`code` is source files; `prose` is documentation: package descriptions, text files, Python's reference
topics and docstrings. A docstring is part of its source file too, so each source file serves one domain
alone, by a hash of its name; copies of a file in other packages have that name and go the same way.
"""

import hashlib
import importlib
import inspect
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.text.quality import is_generated, is_good_code, is_good_prose

DOMAINS = ("code", "prose")
SOURCE = "Python's standard library and the packages installed beside it"
LICENCE = "each file under the licence of its package (standard library: PSF-2.0); not for redistribution"
TRANSFORMATION = (
    "UTF-8, line ends as \\n; quality heuristics; exact duplicates removed; near-duplicates on one side"
)

_TEXT_SUFFIXES = (".rst", ".md", ".txt")
_LEGAL = re.compile(r"licen[cs]e|copying|notice|authors|contributors|patents|third.?party", re.I)
_DOCSTRING_OR_TOKEN = re.compile(
    r"#[^\n]*"  # a comment
    r'|(?P<quote>"""|\'\'\')(?P<text>[^\\]*?(?:\\.[^\\]*?)*)(?P=quote)'
    r'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'',
    re.DOTALL,
)


@dataclass(frozen=True)
class CorpusDocument:
    """A text with the domain that it belongs to."""

    domain: str
    name: str
    """Where it comes from, the same on every machine: `stdlib/...` or `packages/...`."""
    text: str


def installed_corpus(max_bytes: int, folders: dict[str, Path] | None = None) -> Iterator[CorpusDocument]:
    """Documents of all domains, exact duplicates left out, in an order that depends on their names alone.

    No package gives more than a twentieth of a domain, else generated clients of web services would fill it.

    Args:
        max_bytes: bound on the text of each domain, in UTF-8 bytes.
        folders: what to read, by the name that documents are to carry; the standard library and the
            installed packages where none are given.
    """
    files = _list_files(folders or installed_folders())
    seen: set[bytes] = set()
    for domain in DOMAINS:
        used: Counter[str] = Counter()
        full: set[str] = set()
        texts = _code(files, full) if domain == "code" else _prose(files, full)
        for name, text in texts:
            size = len(text.encode())
            digest = hashlib.sha256(text.encode()).digest()
            package = _package(name)
            if used[package] + size > max_bytes // 20:
                full.add(package)
            if digest in seen or package in full:
                continue
            if used.total() + size > max_bytes:
                break
            seen.add(digest)
            used[package] += size
            yield CorpusDocument(domain, name, text)


def installed_folders() -> dict[str, Path]:
    """The folders that Python and its packages were installed in."""
    return {"stdlib": Path(sysconfig.get_path("stdlib")), "packages": Path(sysconfig.get_path("purelib"))}


def docstrings(source: str) -> list[str]:
    """The docstrings of Python source, in order, without their indentation.

    A scan of strings and comments, seven times as fast as parsing: a string in triple quotes is taken
    where a colon, or nothing but comments, comes before it.
    """
    found = []
    is_first = True
    for match in _DOCSTRING_OR_TOKEN.finditer(source):
        if match["quote"] is None:
            continue
        before = source[max(0, match.start() - 200) : match.start()].rstrip("rRuU").rstrip()
        if before.endswith(":") or (is_first and not _uncommented(source[: match.start()])):
            found.append(inspect.cleandoc(match["text"]))
        is_first = False
    return found


def domain_of_source(name: str) -> str:
    """The domain that a source file serves; equal for copies of the file in other packages."""
    parts = name.split("/")
    key = "/".join(parts[-2:]) if parts[-1].startswith("__") else parts[-1]
    return DOMAINS[_hash(key) % 2]


def _list_files(folders: dict[str, Path]) -> dict[str, str]:
    """Names and paths of text files below the folders, ordered by a hash: that is, not at all."""
    files = {}
    for root_name, root in folders.items():
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in {"__pycache__", "site-packages"}]
            prefix = root_name + folder.removeprefix(str(root)).replace(os.sep, "/")
            for name in names:
                if name.endswith((".py", *_TEXT_SUFFIXES)) or name == "METADATA":
                    files[f"{prefix}/{name}"] = f"{folder}/{name}"
    return dict(sorted(files.items(), key=lambda item: (_hash(item[0]), item[0])))


def _code(files: dict[str, str], full: set[str]) -> Iterator[tuple[str, str]]:
    for name, text in _sources(files, full, "code"):
        if is_good_code(text):
            yield name, text


def _prose(files: dict[str, str], full: set[str]) -> Iterator[tuple[str, str]]:
    """Documentation first, since there is least of it, then docstrings."""
    for name, text in _documentation(files):
        if is_good_prose(text):
            yield name, text
    for name, source in _sources(files, full, "prose"):
        if not is_generated(source):
            text = "\n\n".join(docstrings(source)) + "\n"
            if is_good_prose(text):
                yield f"{name}#docstrings", text


def _sources(files: dict[str, str], full: set[str], domain: str) -> Iterator[tuple[str, str]]:
    """Source files of a domain; a package that has become full in the meantime is not read on."""
    for name, path in files.items():
        if name.endswith(".py") and domain_of_source(name) == domain and _package(name) not in full:
            yield name, _read(path)


def _documentation(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, path in files.items():
        if not name.endswith(".py") and not _LEGAL.search(name):
            text = _read(path)
            # A package's METADATA is headers, an empty line, and its description.
            yield name, text.partition("\n\n")[2] if name.endswith("/METADATA") else text
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield f"stdlib/pydoc_data/topics.py#{topic}", topics[topic].strip() + "\n"


def _read(path: str) -> str:
    """The text of a file, or nothing where it is no text."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else text.strip() + "\n"


def _package(name: str) -> str:
    """The package that a document comes from, all of the standard library being one."""
    root, _, rest = name.partition("/")
    return rest.partition("/")[0] if root == "packages" else root


def _uncommented(source: str) -> str:
    """What comes in source besides comments, white space and a string's prefix."""
    return re.sub(r"#[^\n]*", "", source).strip().strip("rRuU")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
