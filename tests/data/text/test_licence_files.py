"""Licences of text files are those that they, or the folders above them, name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from streaming import MDSWriter

from data.text.engines import Processes
from data.text.licence_files import licence_of_file, licence_of_text
from data.text.licences import canonical_of, permits
from data.text.source_keys import check_sources
from data.write_shards import build_shards
from train.recipe.errors import UserError
from train.recipe.preparation import Source, SourceKind
from train.recipe.schema import Recipe

FACTS = {"domain": "prose", "dataset": "tree", "version": "1", "origin": "o", "licence": "various"}
MIT = "Permission is hereby granted, free of charge,\nto any person obtaining a copy of this software"
BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted. "
DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: x

Files: *
Copyright: me
License: GPL-2+ or Artistic

Files: debian/*
License: Expat
"""


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("MIT License\n\nCopyright\n\n" + MIT, "MIT"),
        (f"Parts under MIT:\n{MIT}\nothers:\nApache License\nVersion 2.0", "Apache-2.0 AND MIT"),
        (BSD, "BSD-2-Clause"),
        (BSD + "Neither the name of the owner nor", "BSD-3-Clause"),
        ("GNU GENERAL PUBLIC LICENSE\n  Version 3, 29 June 2007\n ... Lesser General Public", "GPL-3.0-only"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\nVersion 2.1, February 1999", "LGPL-2.1-only"),
        ("SPDX-License-Identifier: MIT OR Apache-2.0\n", "MIT OR Apache-2.0"),
        (DEP5, "(GPL-2.0-or-later OR Artistic-1.0-Perl) AND MIT"),
        (DEP5.replace("GPL-2+ or Artistic", "GPL-3+ with Autoconf exception"),
         "GPL-3.0-or-later WITH Autoconf-exception AND MIT"),
        (DEP5.replace("Expat", "Tcl like"), None),
        ("On Debian systems see `/usr/share/common-licenses/LGPL-2.1'.", "LGPL-2.1-only"),
        ("All rights reserved.", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_a_licence_is_told_by_its_text(text: str, licence: str | None) -> None:
    found = licence_of_text(text)
    if licence is None:
        assert not permits(canonical_of(found), ["GPL-2.0-or-later", "MIT"])
    else:
        assert found == licence


def test_the_nearest_folder_within_the_source_counts(tmp_path: Path) -> None:
    def put(name: str, text: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    put("LICENSE", MIT)
    put("tree/a/COPYING.md", BSD)
    put("tree/two/LICENSE-MIT", MIT)
    put("tree/two/LICENSE-APACHE", "Apache License, Version 2.0")
    put("tree/odd/LICENSE", MIT)
    put("tree/odd/copyright", "ask me")
    for name, licence in {
        "tree/a/b/c.py": "BSD-2-Clause",
        "tree/two/x": "Apache-2.0 AND MIT",
        "tree/odd/x": "",  # Not only under what is known.
        "tree/none/x": "",  # The licence file is above the source.
    }.items():
        file = put(name, "text")
        assert licence_of_file(file, name.count("/") - 1, "text") == licence, name
    file = put("tree/a/b/d.py", "")
    assert licence_of_file(file, 0, "# SPDX-License-Identifier: ISC\n") == "ISC"
    assert licence_of_file(file, 0, "/* SPDX-License-Identifier: (MIT OR ISC) */\n") == "(MIT OR ISC)"
    assert licence_of_file(file, 0, "") == ""


def recipe_of(make: Callable[..., Recipe], shards: Path, **keys: Any) -> Recipe:
    return make(shards, sources=[Source(**FACTS, **keys)], domains={"prose": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "mds"])
def test_text_trees_and_mds_keep_their_licences(
    kind: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    licences = {"one": "MIT", "two": "ISC", "three": ""}
    texts = {n: f"text {n} of {name}: " + " ".join(f"{name}{n}w{i}" for i in range(40))
             for n, name in enumerate([*licences] * 4)}  # fmt: skip
    keys: dict[str, Any] = {"kind": SourceKind(kind), "path": str(tmp_path / "in")}
    if kind == "text":
        for n, text in texts.items():
            name = [*licences][n % 3]
            (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / f"in/{name}/{n}.txt").write_text(text)
            if licences[name]:
                (tmp_path / f"in/{name}/LICENSE").write_text(f"SPDX-License-Identifier: {licences[name]}")
        keys["licence_files"] = True
    else:
        with MDSWriter(out=str(tmp_path / "in"), columns={"text": "str", "terms": "json"}) as writer:
            for n, text in texts.items():
                writer.write({"text": text, "terms": licences[[*licences][n % 3]] or None})
        keys["licence_column"] = "terms"
    build_shards(recipe_of(make_recipe, tmp_path / "all", scores=[], **keys), engine=Processes(1))
    some = recipe_of(make_recipe, tmp_path / "some", licences=["MIT"], **keys)
    record = build_shards(some, engine=Processes(1)).domains["prose"]
    kept = sum(split.documents for split in record.splits.values())
    assert kept == (5 if kind == "text" else 4)  # The licence itself is a document of the tree.
    rows = parquet.read_table(tmp_path / "some/prose/scores.parquet").to_pylist()
    assert {row["licence"] for row in rows} == {"MIT", "ISC", ""}
    lines = [json.loads(it) for it in (tmp_path / "some/prose/rejected.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} >= {"licence: ISC", "licence: none"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kind": SourceKind.text, "licences": ["MIT"]}, r"licence_files: is false, but"),
        ({"kind": SourceKind.text, "licence_column": "x"}, r"licence_column: is set.*set licence_files"),
        ({"kind": SourceKind.jsonl, "licence_files": True}, r"licence_files: is true, but kind jsonl"),
        ({"kind": SourceKind.mds, "licences": ["MIT"]}, r"licence_column: is null"),
    ],
)
def test_mistakes_are_one_line(
    keys: dict[str, Any], words: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = recipe_of(make_recipe, tmp_path / "shards", path=str(tmp_path), **keys)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus=None))
    with pytest.raises(UserError, match=words):
        check_sources(recipe)
