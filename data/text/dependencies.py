"""Order of the files of a repository: a file comes after those that it imports (Guo et al. 2024).

DeepSeek-Coder's order ("DeepSeek-Coder: When the Large Language Model Meets Programming", section 2.2), by
what files say of each other. Imports are found by regular expressions, in time proportional to the text, in
Python, C and C++, JavaScript and TypeScript, Java, Kotlin and Scala, and Rust. Files that import each other
in a circle, and all other files, come in the order of their paths.
"""

import posixpath
import re
from collections.abc import Sequence

Reference = list[str]
"""Paths without their endings, of which the first one that is there is meant. One that begins with a point is
relative to the importing file, others to any folder above it."""
MOST_REFERENCES = 500
"""Of a file; later ones are not looked at."""
_ENDINGS = {
    **dict.fromkeys((".py", ".pyi", ".pyx"), (".py", "/__init__.py", ".pyi", ".pyx")),
    **dict.fromkeys((".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx", ".cu", ".cuh", ".inl"), ("",)),
    **dict.fromkeys(
        (".js", ".jsx", ".ts", ".tsx", ".mjs", ".cjs", ".vue", ".svelte"),
        (
            *("", ".ts", ".tsx", ".js", ".jsx", ".mjs", ".cjs", ".vue", ".svelte"),
            *("/index.ts", "/index.tsx", "/index.js", "/index.jsx"),
        ),
    ),
    **dict.fromkeys((".java", ".kt", ".scala"), (".java", ".kt", ".scala")),
    ".rs": (".rs", "/mod.rs"),
}
"""Endings of what a file of an ending may import."""
_ROOTS = ("", "src", "include", "lib")
"""Folders in which a project keeps what is imported by its path."""
_PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]{0,2000}|[^\n#]{1,2000})"
    r"|import[ \t]+([^\n#]{1,2000}))",
    re.MULTILINE,
)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[\"<]([^\">\n]{1,300})[\">]", re.MULTILINE)
_SCRIPT = re.compile(r"\b(?:from|import|require)[ \t]{0,8}\(?[ \t]{0,8}['\"](\.{1,2}/[^'\"\n]{1,300})['\"]")
_JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?(\w[\w.]{0,300})", re.MULTILINE)
_RUST = re.compile(r"\bmod[ \t]+(\w{1,100});|\buse[ \t]+crate::(\w[\w:]{0,300})")
_RUST_ROOTS = ("mod.rs", "lib.rs", "main.rs")


def references_of(path: str, text: str) -> list[Reference]:
    """Returns what a file imports, as far as it may be in its repository, in the order of the text."""
    name = posixpath.basename(path)
    ending = posixpath.splitext(name)[1].lower()
    if ending not in _ENDINGS:
        return []
    found: list[Reference] = []
    if _ENDINGS[ending] == _ENDINGS[".py"]:
        for match in _PYTHON.finditer(text):
            found += _of_python(*match.groups())
    elif _ENDINGS[ending] == _ENDINGS[".c"]:
        found = [[match] for match in _INCLUDE.findall(text)]
    elif _ENDINGS[ending] == _ENDINGS[".js"]:
        found = [[match] for match in _SCRIPT.findall(text)]
    elif _ENDINGS[ending] == _ENDINGS[".java"]:
        for match in _JAVA.findall(text):
            place = match.strip(".").replace(".", "/")
            found.append([place, posixpath.dirname(place)])
    else:
        below = "." if name in _RUST_ROOTS else f"./{name.removesuffix('.rs')}"
        for module, used in _RUST.findall(text):
            place = used.strip(":").replace("::", "/")
            found.append([f"{below}/{module}"] if module else [place, posixpath.dirname(place)])
    return [[it for it in each if it] for each in found[:MOST_REFERENCES]]


def in_order(paths: Sequence[str], references: Sequence[Sequence[Reference]]) -> list[int]:
    """Returns the numbers of a repository's files, each after those that it imports.

    Depth first from the files in the order of their paths, so that what belongs together is close together.

    Args:
        paths: of the files; of equal ones the first is imported.
        references: of each file.
    """
    places: dict[str, int] = {}
    for number, path in enumerate(paths):
        places.setdefault(posixpath.normpath(path), number)
    by_path = sorted(range(len(paths)), key=lambda number: (paths[number], number))
    rank = {number: place for place, number in enumerate(by_path)}
    imported = [
        sorted(
            {it for it in (_find(paths[n], each, places) for each in references[n]) if it is not None} - {n},
            key=rank.__getitem__,
        )
        for n in range(len(paths))
    ]
    ordered: list[int] = []
    begun: set[int] = set()
    for first in by_path:
        # Of each file on the way, those of its imports that are still to be visited, the next one last.
        way = [(first, imported[first][::-1])] if first not in begun else []
        begun.add(first)
        while way:
            number, left = way[-1]
            while left and left[-1] in begun:
                left.pop()
            if left:
                begun.add(left[-1])
                way.append((left[-1], imported[left[-1]][::-1]))
            else:
                ordered.append(number)
                way.pop()
    return ordered


def _of_python(
    dots: str | None, module: str | None, names: str | None, modules: str | None
) -> list[Reference]:
    if modules is not None:
        first = (part.split()[:1] for part in modules.split(","))
        return [[it.replace(".", "/")] for each in first for it in each]
    above = "" if not dots else "./" + "../" * (len(dots) - 1)
    place = above + (module or "").strip(".").replace(".", "/")
    lines = (line.partition("#")[0] for line in (names or "").lstrip("(").split("\n"))
    found = []
    for part in ",".join(lines).split(","):
        if words := part.split():
            inside = f"{place.rstrip('/')}/{words[0]}" if place else words[0]
            found.append([inside] if place in ("", above) else [inside, place])
    return found


def _find(path: str, reference: Reference, places: dict[str, int]) -> int | None:
    """Returns the number of the file that a reference means; None if it is not in the repository."""
    folder, endings = posixpath.dirname(path), _ENDINGS[posixpath.splitext(path)[1].lower()]
    is_relative = reference[0].startswith(".") if reference else False
    bases = (
        [folder] if is_relative else [posixpath.join(it, root) for it in _above(folder) for root in _ROOTS]
    )
    for base in bases:
        for place in reference:
            whole = posixpath.normpath(posixpath.join(base, place))
            for ending in endings:
                if (found := places.get(whole + ending)) is not None:
                    return found
    return None


def _above(folder: str) -> list[str]:
    """A folder and those above it, the nearest first; at most 30."""
    parts = folder.split("/")[-30:] if folder else []
    first = folder[: len(folder) - len("/".join(parts))]
    return [first + "/".join(parts[:count]) for count in range(len(parts), -1, -1)]
