"""The parts of the documentation site that are ours; `make docs` builds it with Sphinx."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from train.recipe.catalogue import schema_keys
from train.recipe.schema import Recompute

ROOT = Path(__file__).resolve().parents[1]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/site/{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_key_is_in_the_reference_with_what_is_declared_of_it() -> None:
    page = module("reference").reference()
    entries = dict(
        re.findall(r"\.\. recipe-key:: (\S+)\n\n(.*?)(?=\n\.\. recipe|\Z|\n\S+\n-+\n)", page, re.DOTALL)
    )
    assert list(entries) == re.findall(r"recipe-key:: (\S+)", page)
    assert sorted(entries) == sorted(schema_keys())
    for name, key in schema_keys().items():
        assert key.doc in entries[name] and (key.rules.range in entries[name]), name
    clip, grades = entries["training.clip_norm"], ", ".join(f"``{each.value}``" for each in Recompute)
    assert "number or null; default ``1.0``; above 0" in clip and "on resume: stays" in clip
    assert f"one of {grades}; default ``nothing``" in entries["training.recompute"]
    assert "on resume: may change" in entries["training.recompute"]
    headings = re.findall(r"^(\S.*)\n-+$", page, re.MULTILINE)
    assert len(headings) == len(set(headings))


def test_every_page_is_in_the_contents() -> None:
    listed = set(
        re.findall(r"^(?:docs/)(\w[\w-]*)$", (ROOT / "docs/site/contents.md").read_text(), re.MULTILINE)
    )
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")} | {"reference"}
