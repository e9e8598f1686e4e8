"""The README names every folder, and no command that does not exist."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_names_every_folder() -> None:
    folders = {path.parent for top in ("train", "data", "launch") for path in (ROOT / top).rglob("*.py")}
    assert len(folders) > 8
    assert [str(f) for f in folders if not re.search(rf"^ *{f.name}/ ", README, re.MULTILINE)] == []
    for name in re.findall(r"^ *(\w+)/ ", README, flags=re.MULTILINE):
        assert any(ROOT.glob(f"**/{name}")) or name == "checkpoints", name


def test_every_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", README):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for file in re.findall(r"(?:yamls|docs)/[\w.-]+\.(?:yaml|md)", README):
        assert (ROOT / file).is_file(), file


def test_nothing_large_is_tracked() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert [str(f) for f in files if f.is_file() and f.stat().st_size > 1_000_000] == []
