"""Allowed imports between packages. Every arrow that is added or disappears is recorded here.

A package is a folder directly below `train`, `data` or `launch` with everything in it; `train`, `data` and
`launch` themselves stand for the modules directly in them.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("train", "data", "launch")

MAY_IMPORT = """
train.recipe
train.record       train.recipe

data               train.recipe train.record data.order data.shards data.text
data.order         train.recipe
data.shards        train.recipe train.record data
data.text          train.recipe train.record data data.shards
data.explore       train.recipe train.record data data.shards data.text
data.audit         train.recipe train.record data data.order data.shards data.explore

train.cpu
train.model        train.recipe train.cpu
train.layout       train.recipe train.record train.model
train.checkpoint   train.recipe train.record
train.health       train.recipe train.record
train.preflight    train.recipe train.record data train.health
train.step         train.recipe train.record data data.shards data.audit train.model train.layout
                   train.checkpoint

train.start        train.recipe train.record data data.order data.shards train.layout train.checkpoint
                   train.step train.hf

train.hf           train.recipe train.record data train.model train.checkpoint
train.generate     train.recipe train.record data data.text train.model train.hf
train.report       train.recipe train.record
train.evaluate     train.recipe train.record data train.model train.hf train.report
train.tracking     train.recipe train.record train.hf
train.translate    train.recipe train.record
train.runs         train.recipe train.record train.report train.tracking
train              train.recipe train.record data data.order data.shards train.model train.layout
                   train.checkpoint train.health train.preflight train.step train.hf train.start
                   train.generate train.evaluate train.report train.tracking

launch             train.recipe train.record data train.preflight train launch.verify
launch.plan        train.recipe train.record train
launch.restart     train.recipe train.record train.health train
launch.submit      train.recipe train.record train.health launch.plan launch.restart
launch.rehearse    train.recipe train.record train.model train.layout train.checkpoint train.health
                   train.step train.hf train launch.plan
launch.gpu_check   train.recipe train.record train.model train.layout train.preflight train.step
                   launch.plan launch.verify
launch.verify      train.recipe train.record data data.order data.shards data.text data.audit train.model
                   train.layout train.checkpoint train.health train.step train.hf train launch.restart
launch.experiments train.recipe train.record data data.order data.shards data.text train.model
                   train.layout train.checkpoint train.health train.step train.preflight train.hf
                   train.evaluate train.report train.tracking train launch.plan launch.restart launch.verify
"""
"""A package, and behind it those that it imports, from the ground floor up."""

LAWS = {
    "train.recipe": (),
    "train.record": ("train.recipe",),
    "train.cpu": (),
    "train.model": ("train.recipe", "train.cpu"),
    "data": ("data", "train.recipe", "train.record"),
    "train": ("train", "data"),
}
"""The floors: all that a package, and those in it, may ever import, by the beginnings of names."""


def allowed() -> set[tuple[str, str]]:
    """Returns the arrows of the table; a line that begins with a space continues the previous one."""
    pairs, package = set(), ""
    for line in MAY_IMPORT.splitlines():
        words = line.split()
        if words and not line.startswith(" "):
            package = words.pop(0)
        pairs |= {(package, other) for other in words}
    return pairs


def arrows() -> dict[tuple[str, str], list[str]]:
    """Returns the importing lines by importing and imported package, including imports inside functions."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(path for top in TOP for path in (ROOT / top).rglob("*.py")):
        place = file.relative_to(ROOT)
        package = package_of(list(place.with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{place}:{node.lineno}: import by the full name"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for parts in (name.split(".") for name in names):
                if parts[0] in TOP and package_of(parts) != package:
                    found.setdefault((package, package_of(parts)), []).append(f"{place}:{node.lineno}")
    return found


def package_of(parts: list[str]) -> str:
    """Returns the package of a module, by the parts of its name."""
    is_folder = len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir()
    return ".".join(parts[: 1 + is_folder])


def test_packages_import_what_the_table_says() -> None:
    found, table = arrows(), allowed()
    added = [f"{a} imports {b}: {', '.join(found[a, b])}" for a, b in sorted(found.keys() - table)]
    gone = [f"{a} no longer imports {b}: take it out" for a, b in sorted(table - found.keys())]
    assert not added + gone, "\n" + "\n".join(added + gone)


def test_the_table_keeps_the_floors_apart() -> None:
    broken = [
        f"{package} must not import {other}"
        for package, other in sorted(allowed())
        for floor, may in LAWS.items()
        if is_within(package, floor) and not any(is_within(other, above) for above in may)
    ]
    assert broken == []


def test_packages_form_no_circle() -> None:
    """But for the modules that lie flat in `data`, which its folders import and which import them."""
    graph: dict[str, set[str]] = {}
    for pair in allowed():
        package, other = ("data" if is_within(name, "data") else name for name in pair)
        if package != other:
            graph.setdefault(package, set()).add(other)
    TopologicalSorter(graph).prepare()


def is_within(package: str, other: str) -> bool:
    """Returns True if a package is another one or inside it."""
    return f"{package}.".startswith(f"{other}.")


def test_the_ground_floor_needs_neither_torch_nor_numpy() -> None:
    modules = [f"train.recipe.{path.stem}" for path in (ROOT / "train/recipe").glob("*.py")]
    assert modules
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(result.stdout.split())
