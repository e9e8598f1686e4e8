"""The README names every module and no command that does not exist."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_map_has_every_module() -> None:
    modules = [
        path
        for folder in ("train", "data", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    ]
    assert len(modules) > 40
    assert [str(m.relative_to(ROOT)) for m in modules if f"\n  {m.name} " not in README] == []


def test_the_map_has_no_module_that_is_gone() -> None:
    named = re.findall(r"^  (\w+\.py) ", README, flags=re.MULTILINE)
    there = {path.name for folder in ("train", "data", "launch") for path in (ROOT / folder).rglob("*.py")}
    assert [name for name in named if name not in there] == []


def test_every_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for file in re.findall(r"(?:yamls|docs)/[\w.-]+\.(?:yaml|md)", README):
        assert (ROOT / file).is_file(), file


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_large_is_tracked() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert [str(f) for f in files if f.is_file() and f.stat().st_size > 1_000_000] == []
