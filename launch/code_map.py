"""The map of the code in docs/map.md, from the first line of each module: `python -m launch.code_map`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "docs" / "map.md"
FOLDERS = ("train", "data", "launch")


def code_map() -> str:
    """The page: a table of modules for each folder."""
    lines = ["# Map of the code", "", "Made by `make format` from the first line of each module."]
    folders = sorted({path.parent for top in FOLDERS for path in (ROOT / top).rglob("*.py")}, key=_place)
    for folder in folders:
        lines += ["", f"## {folder.relative_to(ROOT)}/", "", "| module | what it is |", "|---|---|"]
        lines += [f"| {path.name} | {_first_line(path)} |" for path in sorted(folder.glob("*.py"))]
    return "\n".join(lines) + "\n"


def _place(folder: Path) -> tuple[int, Path]:
    return FOLDERS.index(folder.relative_to(ROOT).parts[0]), folder


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"
    return docstring.split("\n", 1)[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(f"usage: python -m launch.code_map (no arguments): {__doc__}")
    MAP.write_text(code_map())
