"""Files come after those that they import, whatever their text."""

import pytest

from data.text.dependencies import in_order, references_of


@pytest.mark.parametrize(
    ("files", "order"),
    [
        (
            {
                "app/main.py": "from app.core import run\nfrom . import util, views as v\nimport app.zeta",
                "app/core.py": "from ..lib.base import (\n  Thing,  # the base\n  other)\n",
                "app/util.py": "",
                "app/views.py": "import app.main",
                "app/zeta/__init__.py": "",
                "lib/base.py": "import numpy",
            },
            [
                "lib/base.py",
                "app/core.py",
                "app/util.py",
                "app/views.py",
                "app/zeta/__init__.py",
                "app/main.py",
            ],
        ),
        (
            {
                "a.c": '#include "b.h"\n#include <p/c.h>\n#include <stdio.h>',
                "b.h": " # include <p/c.h>",
                "include/p/c.h": "",
                "README.md": "",
            },
            ["README.md", "include/p/c.h", "b.h", "a.c"],
        ),
        (
            {
                "src/a.ts": "import { x } from './z/b'\nconst y = require('../c.js')",
                "src/z/b.tsx": 'export * from "./d"',
                "src/z/d/index.js": "",
                "c.js": "import './src/a'",
            },
            ["src/z/d/index.js", "src/z/b.tsx", "src/a.ts", "c.js"],
        ),
        (
            {
                "m/src/main/java/o/A.java": "package o;\nimport o.q.B;\nimport static o.C.f;\n",
                "m/src/main/java/o/q/B.java": "",
                "m/src/main/java/o/C.java": "",
            },
            ["m/src/main/java/o/C.java", "m/src/main/java/o/q/B.java", "m/src/main/java/o/A.java"],
        ),
        (
            {
                "src/lib.rs": "pub mod a;\nuse crate::z::Z;",
                "src/a.rs": "mod b;",
                "src/a/b.rs": "",
                "src/z.rs": "",
            },
            ["src/a/b.rs", "src/a.rs", "src/z.rs", "src/lib.rs"],
        ),
        ({"b.py": "import a", "a.py": "import b", "c.py": "import c"}, ["b.py", "a.py", "c.py"]),
        ({}, []),
    ],
)
def test_a_file_comes_after_those_that_it_imports(files: dict[str, str], order: list[str]) -> None:
    paths = list(files)
    references = [references_of(path, text) for path, text in files.items()]
    assert [paths[n] for n in in_order(paths, references)] == order


@pytest.mark.parametrize("ending", [".py", ".c", ".js", ".java", ".rs"])
@pytest.mark.parametrize(
    "unit", [" ", "import ", "from . import (", "#include <", "a.", "\n", "mod ", "((", "'./"]
)
def test_imports_are_found_in_any_text(ending: str, unit: str) -> None:
    """None takes the square of the text's length: of half a million characters, that would not end."""
    for found in references_of(f"a{ending}", unit * (500_000 // len(unit))):
        assert all(found)


def test_a_long_chain_of_imports_needs_no_stack() -> None:
    paths = [f"m{n:05}.py" for n in range(20_000)]
    references = [references_of(path, f"import m{n + 1:05}") for n, path in enumerate(paths)]
    assert in_order(paths, references) == list(range(20_000))[::-1]
