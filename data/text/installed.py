"""The installed corpus: code and prose of Python and its packages, real text that every installation has.

`code` consists of source files, `prose` of documentation: package descriptions, text files, Python's
reference topics and docstrings. `messages`, which is neither, is what programs say to people, in five
languages: the system's message catalogues, which most distributions of Linux install; only recipes that name
it read them. Since a docstring is also part of its source file, each source file is used for only one domain,
chosen by a hash of its name. Copies of a file in other packages have the same name, hence the same domain.
"""

import gettext
import hashlib
import importlib
import inspect
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.text.quality import is_generated, is_good_code, is_good_prose
from train.recipe.errors import UserError

SOURCE_DOMAINS = ("code", "prose")
MESSAGES = "messages"
DOMAINS = (*SOURCE_DOMAINS, MESSAGES)
LOCALES = Path("/usr/share/locale")
"""Message catalogues of Linux distributions: LANGUAGE/LC_MESSAGES/PROGRAM.mo."""
LANGUAGES = ("de", "es", "fr", "it", "sv")
"""Languages of `messages`: those with most text in Latin letters."""
SOURCE = "Python's standard library and the packages installed beside it"
MESSAGES_SOURCE = "message catalogues of the system's programs"
LICENCE = "each file under the licence of its package (standard library: PSF-2.0); not for redistribution"
TRANSFORMATION = (
    "UTF-8, line ends as \\n; quality heuristics; exact duplicates removed; near-duplicates on one side"
)

_MESSAGES_LENGTH = 8_000
"""Characters of a document of messages: a catalogue is as long as a book."""
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
    """A text and its domain."""

    domain: str
    name: str
    """Its origin, the same on every machine: `stdlib/...`, `packages/...` or `locale/...`."""
    text: str


def installed_corpus(
    max_bytes: int, folders: dict[str, Path] | None = None, domains: Collection[str] = SOURCE_DOMAINS
) -> Iterator[CorpusDocument]:
    """Yields documents without exact duplicates, in an order that depends only on their names.

    No package provides more than a twentieth of a domain; otherwise generated clients of web services would
    dominate.

    Args:
        max_bytes: bound on the text of each domain, in UTF-8 bytes.
        folders: folders to read, by name prefix of their documents; None: the standard library and the
            installed packages, and for messages :data:`LOCALES`.
        domains: those wanted, of :data:`DOMAINS`.

    Raises:
        UserError: if messages are wanted and there are none.
    """
    folders = folders or installed_folders()
    files = _list_files({name: folder for name, folder in folders.items() if name != "locale"})
    seen: set[bytes] = set()
    for domain in (name for name in DOMAINS if name in domains):
        used: Counter[str] = Counter()
        full: set[str] = set()
        if domain == MESSAGES:
            texts = _messages(folders["locale"], full)
        else:
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
    """The folders of Python's standard library and packages, and of the system's message catalogues."""
    python = {"stdlib": Path(sysconfig.get_path("stdlib")), "packages": Path(sysconfig.get_path("purelib"))}
    return {**python, "locale": LOCALES}


def docstrings(source: str) -> list[str]:
    """Extracts the docstrings of Python source, in order, without indentation.

    Scans strings and comments, seven times as fast as parsing: a triple-quoted string counts if it follows a
    colon or only comments.
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
    """The domain of a source file; equal for copies of the file in other packages."""
    parts = name.split("/")
    key = "/".join(parts[-2:]) if parts[-1].startswith("__") else parts[-1]
    return SOURCE_DOMAINS[_hash(key) % 2]


def _list_files(folders: dict[str, Path]) -> dict[str, str]:
    """Names and paths of text files below the folders, in pseudorandom order (sorted by a hash)."""
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
    """Yields documentation first, since it is scarcer, then docstrings."""
    for name, text in _documentation(files):
        if is_good_prose(text):
            yield name, text
    for name, source in _sources(files, full, "prose"):
        if not is_generated(source):
            text = "\n\n".join(docstrings(source)) + "\n"
            if is_good_prose(text):
                yield f"{name}#docstrings", text


def _messages(locales: Path, full: set[str]) -> Iterator[tuple[str, str]]:
    """Yields the translations of message catalogues, a message a line, in documents of a few kilobytes."""
    paths = [path for language in LANGUAGES for path in (locales / language / "LC_MESSAGES").glob("*.mo")]
    if not paths:
        what = f"has messages, but {locales} has no message catalogue in {', '.join(LANGUAGES)}"
        raise UserError(what, key="data.domains", remedy="leave it out, or install the system's translations")
    names = {f"locale/{path.name}/{path.parts[-3]}": path for path in paths}
    for name in sorted(names, key=lambda name: (_hash(name), name)):
        lines: list[str] = []
        number = 0
        for line in _translations(names[name]) if _package(name) not in full else ():
            lines.append(line)
            if sum(map(len, lines)) >= _MESSAGES_LENGTH:
                yield f"{name}#{number}", "\n".join(lines) + "\n"
                lines, number = [], number + 1
        if lines:
            yield f"{name}#{number}", "\n".join(lines) + "\n"


def _translations(path: Path) -> list[str]:
    """Reads the messages of a catalogue that are translated, in its order; none if it is damaged."""
    try:
        with path.open("rb") as file:
            catalogue = vars(gettext.GNUTranslations(file))["_catalog"]
    except (OSError, UnicodeDecodeError, ValueError):
        return []
    return [
        text.strip()
        for key, text in catalogue.items()
        if key and text.strip() and text != (key[0] if isinstance(key, tuple) else key)
    ]


def _sources(files: dict[str, str], full: set[str], domain: str) -> Iterator[tuple[str, str]]:
    """Yields source files of a domain, except those of packages that are already full."""
    for name, path in files.items():
        if name.endswith(".py") and domain_of_source(name) == domain and _package(name) not in full:
            yield name, _read(path)


def _documentation(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, path in files.items():
        if not name.endswith(".py") and not _LEGAL.search(name):
            text = _read(path)
            # A package's METADATA consists of headers, an empty line, and the description.
            yield name, text.partition("\n\n")[2] if name.endswith("/METADATA") else text
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield f"stdlib/pydoc_data/topics.py#{topic}", topics[topic].strip() + "\n"


def _read(path: str) -> str:
    """Reads a file's text; empty if it is not text."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else text.strip() + "\n"


def _package(name: str) -> str:
    """The package of a document, or its program; the whole standard library counts as one."""
    root, _, rest = name.partition("/")
    if root == "locale":
        return f"locale/{rest.partition('/')[0]}"
    return rest.partition("/")[0] if root == "packages" else root


def _uncommented(source: str) -> str:
    """Source without comments, outer white space and string prefixes."""
    return re.sub(r"#[^\n]*", "", source).strip().strip("rRuU")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
