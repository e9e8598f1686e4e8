"""Files of a repository are joined as a few plain lines would, in any order of tasks and on both engines."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.explore.sample import Finder
from data.shards.manifest import Manifest, check_shards
from data.shards.streams import ShardFolder
from data.text.engines import Engine, Processes, Spark
from data.text.job import Limits
from data.tokenizer import open_tokenizer
from data.write_shards import build_shards, describe
from train.recipe.errors import UserError
from train.recipe.preparation import FileOrder, Preparation, Repositories, Source, SourceKind
from train.recipe.schema import Recipe

FACTS = {"dataset": "hub", "version": "1", "origin": "o", "licence": "various"}
MOST_BYTES = 6000


def corpus() -> list[dict[str, Any]]:
    """Files of twelve repositories, and of none, in any order; some are copies or half alike."""
    rng = np.random.default_rng(8)
    names = [f"word{n}" for n in range(400)]
    rows: list[dict[str, Any]] = []
    for n in range(12):
        paths = [f"{folder}/{'xyzuvw'[at]}{at}.py" for folder in ("pkg", "tests") for at in range(1 + n % 6)]
        for path in paths:
            lines = [
                f"import {other.removesuffix('.py').replace('/', '.')}"
                for other in rng.choice(paths, 2)
                if other != path
            ]
            body = " ".join(rng.choice(names, int(rng.integers(20, 200))))
            rows.append({"repo": f"org/r{n}", "path": path, "text": "\n".join([*lines, f"# {body}"])})
    rows += [{"repo": None, "path": "a.py", "text": " ".join(rng.choice(names, 60))} for _ in range(9)]
    rows += [{"repo": "org/copies", "path": f"{n}.py", "text": rows[n]["text"]} for n in range(3)]
    rows += [{"repo": "org/r1", "path": "late.py", "text": " ".join(rng.choice(names, 900))}]
    return [rows[n] for n in rng.permutation(len(rows))]


def recipe_of(
    folder: Path, make: Callable[..., Recipe], shards: str, repositories: Repositories | None, **changes: Any
) -> Recipe:
    source = Source(
        domain="code",
        kind=SourceKind.jsonl,
        path=str(folder / "in.jsonl"),
        repositories=repositories,
        **FACTS,
    )
    source = dataclasses.replace(source, **changes.pop("source", {}))
    settings = {"max_document_bytes": MOST_BYTES, "validation_share": 0.2, "chunk_bytes": 2500} | changes
    preparation = Preparation(**settings)
    return make(folder / shards, sources=[source], domains={"code": 1.0}, preparation=preparation)


def listing(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "code/documents.jsonl").read_text().splitlines()]


def texts(recipe: Recipe) -> list[str]:
    """The text of each document, by its tokens."""
    root = Path(recipe.data.shards)
    tokenizer = open_tokenizer(recipe.tokenizer, root)
    finders = {side: Finder(ShardFolder(root / "code" / side)) for side in ("train", "validation")}
    return [
        tokenizer.decode(finders[line["split"]].read(number)[0][:-1].tolist())
        for number, line in enumerate(listing(root))
    ]


def depends_on(paths: list[str], files: dict[str, str], path: str) -> list[str]:
    """The files that a file of the corpus imports, by their paths."""
    imported = [line.split()[1] for line in files[path].split("\n") if line.startswith("import ")]
    return sorted({it.replace(".", "/") + ".py" for it in imported} & set(paths) - {path})


def plain_order(files: dict[str, str]) -> list[str]:
    ordered: list[str] = []
    begun: set[str] = set()

    def visit(path: str) -> None:
        if path not in begun:
            begun.add(path)
            for other in depends_on(list(files), files, path):
                visit(other)
            ordered.append(path)

    for path in sorted(files):
        visit(path)
    return ordered


def expected(
    separate: list[tuple[dict[str, Any], str]], rows: dict[str, dict[str, Any]], of: Repositories
) -> list[tuple[str, str, list[str], str]]:
    """Name, side, files and text of each joined document, from those that are not joined, in a plain way."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for line, text in separate:
        repository = rows[line["name"]]["repo"]
        groups.setdefault(f"/{repository}" if repository else line["name"], []).append(
            (line["name"], line["split"], text)
        )
    found = []
    for group in sorted(groups, key=lambda it: np.frombuffer(_hash(it), "<u8").tolist()):
        files = groups[group]
        by_path = {rows[name]["path"]: (name, split, text) for name, split, text in files}
        order = list(by_path)
        if of.order is FileOrder.path:
            order = sorted(by_path)
        elif of.order is FileOrder.dependencies:
            order = plain_order({path: text for path, (_, _, text) in by_path.items()})
        name = f"hub{group}" if group.startswith("/") else group
        number = 0
        for side in ("train", "validation"):
            parts: list[tuple[str, str]] = []
            for path in order:
                if by_path[path][1] != side:
                    continue
                heading = of.heading.replace("{path}", path) + "\n" if of.heading and group[0] == "/" else ""
                part = by_path[path][0], heading + by_path[path][2]
                if parts and len("\n".join([*(it for _, it in parts), part[1]]).encode()) > MOST_BYTES:
                    found.append((name, number, side, parts))
                    number, parts = number + 1, []
                parts.append(part)
            if parts:
                found.append((name, number, side, parts))
                number += 1
    return [
        (f"{name}#{n}" if n else name, side, [it for it, _ in parts], "\n".join(it for _, it in parts))
        for name, n, side, parts in found
    ]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:16]


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a corpus in a file, by the names that their documents have."""
    offset, found = 0, {}
    lines = [json.dumps(row).encode() + b"\n" for row in corpus()]
    for line in lines:
        found[f"hub/in.jsonl#{offset}"] = json.loads(line)
        offset += len(line)
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", FileOrder)
def test_documents_are_those_of_plain_lines(
    order: FileOrder,
    rows: dict[str, dict[str, Any]],
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = Repositories(column="repo", path_column="path", order=order, heading="# {path}")
    apart = recipe_of(tmp_path, make_recipe, "apart", None)
    build_shards(apart, engine=Processes(1))
    wanted = expected(list(zip(listing(tmp_path / "apart"), texts(apart), strict=True)), rows, of)
    assert len({name for name, *_ in wanted if "#" in name[-3:]}) > 3  # Some don't fit into one document.
    recipe = recipe_of(tmp_path, make_recipe, "joined", of)
    # Partitions of a few files, buffers of one.
    limits = Limits(span_documents=20, buffer_bytes=4000, sort_bytes=20_000)
    monkeypatch.setattr("data.text.job.PreparationJob.limits", limits)
    manifest = build_shards(recipe, engine=Processes(2))
    root = Path(recipe.data.shards)
    found = [
        (line["name"], line["split"], line["files"], text)
        for line, text in zip(listing(root), texts(recipe), strict=True)
    ]
    assert found == wanted
    assert check_shards(root, every_byte=True) == manifest
    # Every file is in one document, and copies in none.
    names = [name for _, _, files, _ in found for name in files]
    assert sorted(names) == sorted(line["name"] for line in listing(tmp_path / "apart"))
    splits = manifest.domains["code"].splits.values()
    assert sum(it.files or 0 for it in splits) == len(names) < len(rows)
    assert f"{len(names)} files of repositories are joined into {len(found)} documents" in describe(
        manifest, root
    )
    assert f"order of {order.value}" in manifest.domains["code"].transformation


@pytest.mark.slow
@pytest.mark.usefixtures("rows")
def test_neither_engine_nor_chunks_nor_memory_change_a_byte(
    tmp_path: Path, make_recipe: Callable[..., Recipe], spark: Spark, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Repositories(column="repo", path_column="path", order=FileOrder.dependencies)

    def built(name: str, engine: Engine, **changes: Any) -> Manifest:
        return build_shards(recipe_of(tmp_path, make_recipe, name, of, **changes), engine=engine)

    one = built("one", Processes(1))
    assert built("spark", spark).digest == one.digest
    # With all scores there is another file of them.
    kept = built("kept", Processes(2), keep_cleaned=True).domains["code"]
    assert (kept.splits, kept.documents_sha256) == (
        one.domains["code"].splits,
        one.domains["code"].documents_sha256,
    )
    limits = Limits(span_documents=7, buffer_bytes=3000, sort_bytes=9000)
    monkeypatch.setattr("data.text.job.PreparationJob.limits", limits)
    assert built("small", Processes(2), chunk_bytes=9000).digest == one.digest


@pytest.mark.slow
def test_one_repository_of_all_files_needs_no_more_memory(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that has one name in all records: files beyond a limit are another part of it."""
    rows = [row | {"repo": "same"} for row in corpus()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        "data.text.job.PreparationJob.limits", Limits(span_documents=7, buffer_bytes=8000, sort_bytes=900)
    )
    of = Repositories(column="repo", path_column="path")
    recipe = recipe_of(tmp_path, make_recipe, "shards", of)
    build_shards(recipe, engine=Processes(1))
    lines = listing(tmp_path / "shards")
    assert sum(len(line["files"]) for line in lines) > 70 and all(len(it["files"]) < 12 for it in lines)
    assert [line["name"] for line in lines] == [
        f"hub/same#{n}" if n else "hub/same" for n in range(len(lines))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "mds", "text"])
def test_every_kind_with_text_has_repositories(
    kind: str, rows: dict[str, dict[str, Any]], tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    of = Repositories(column="at.repo" if kind == "parquet" else "repo", path_column="path")
    table = [row for row in rows.values() if row["repo"]]
    if kind == "parquet":
        columns = {name: [row[name] for row in table] for name in ("path", "text")}
        columns["at"] = [{"repo": row["repo"]} for row in table]
        parquet.write_table(pa.table(columns), tmp_path / "in", row_group_size=9)
        os.rename(tmp_path / "in", tmp_path / "in.parquet")  # noqa: PTH104
    elif kind == "mds":
        from streaming import MDSWriter

        with MDSWriter(
            out=str(tmp_path / "in"), columns={"path": "str", "repo": "str", "text": "str"}
        ) as writer:
            for row in table:
                writer.write(row)
    else:
        for row in table:
            file = tmp_path / "in" / row["repo"] / row["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(row["text"])
        of = Repositories(folders=2)
    source = {"kind": SourceKind(kind), "path": str(tmp_path / ("in.parquet" if kind == "parquet" else "in"))}
    recipe = recipe_of(tmp_path, make_recipe, "shards", of, source=source, near_duplicates=None)
    build_shards(recipe, engine=Processes(1))
    lines = listing(tmp_path / "shards")
    assert {line["name"].rpartition("#")[0] or line["name"] for line in lines} >= {
        f"hub/org/r{n}"
        for n in range(1, 12)  # Those of the first are copies.
    }
    if kind == "text":
        for line in lines:
            assert line["files"] == sorted(line["files"])


@pytest.mark.parametrize(
    ("source", "of", "words"),
    [
        ({}, Repositories(), r"repositories.column: is null, so nothing names"),
        ({}, Repositories(column="repo"), r"repositories.path_column: is null, but the order is path"),
        (
            {},
            Repositories(column="repo", order=FileOrder.source, heading="{path}"),
            r"path_column: is null, but the heading has \{path\}",
        ),
        ({}, Repositories(column="r", folders=1), r"repositories.folders: is 1, but only text sources"),
        ({"kind": SourceKind.text}, Repositories(), r"repositories.folders: is null, so no folder"),
        ({"kind": SourceKind.text}, Repositories(column="r"), r"repositories.column: is set, but a text"),
        (
            {"kind": SourceKind.instructions},
            Repositories(column="r"),
            r"is set, but .* has conversations",
        ),
        (
            {"kind": SourceKind.mds, "tokenizer": "none"},
            Repositories(column="r"),
            r"repositories: is set, but kind mds has token ids",
        ),
        (
            {},
            Repositories(column="project", path_column="path"),
            r"data.sources\[0\].repositories.column: no record of hub has a name in 'project'",
        ),
        (
            {"kind": SourceKind.text, "path": "data/audit"},
            Repositories(folders=3),
            r"data.sources\[0\].repositories.folders: is 3, but no file of hub is in so many folders",
        ),
    ],
)
@pytest.mark.usefixtures("rows")
def test_mistakes_are_one_line(
    source: dict[str, Any],
    of: Repositories,
    words: str,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
) -> None:
    with pytest.raises(UserError, match=words):
        build_shards(recipe_of(tmp_path, make_recipe, "shards", of, source=source), engine=Processes(1))
