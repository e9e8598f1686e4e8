"""A source or file that lost most records is refused or named; bytes read are bytes kept or rejected."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data.shards.manifest import Manifest
from data.text.engines import Processes
from data.write_shards import build_shards, describe
from tests.data.conftest import small_documents
from train.recipe.errors import UserError
from train.recipe.preparation import Source, SourceKind
from train.recipe.schema import Recipe

pytestmark = pytest.mark.slow

TEXTS = [document.text for document in small_documents()]
PROSE, CODE = TEXTS[60:], TEXTS[:60]


def write(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


@pytest.fixture
def build(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., Manifest]:
    """Builds the shards of the folders in ``tmp_path``, a source of each, all in one domain."""

    def build(*names: str, chunk_bytes: int = 8_000_000, kind: SourceKind = SourceKind.jsonl) -> Manifest:
        sources = [
            Source(
                domain="prose",
                kind=kind,
                path=str(tmp_path / name),
                dataset=name,
                version="1",
                origin="o",
                licence="l",
            )
            for name in names
        ]
        recipe = make_recipe(tmp_path / "shards", sources=sources, domains={"prose": 1.0})
        parts = dataclasses.replace(recipe.data.preparation, chunk_bytes=chunk_bytes)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, preparation=parts))
        return build_shards(recipe, engine=Processes(1), rebuild=True)

    return build


def losses(manifest: Manifest) -> list[str]:
    return manifest.domains["prose"].losses


def test_a_source_without_a_readable_record_is_refused(tmp_path: Path, build: Callable[..., Manifest]):
    write(tmp_path / "good/a.jsonl", PROSE)
    write(tmp_path / "lost/b.jsonl", CODE, "content")
    with pytest.raises(UserError) as caught:
        build("good", "lost")
    assert str(caught.value) == (
        "data.sources[1].text_column: lost gave no text: of 60 no text the first is lost/b.jsonl#0, "
        "no text: no 'text'; it has content; name the column or key of the text"
    )
    (tmp_path / "lost/b.jsonl").write_text(json.dumps([{"text": text} for text in CODE], indent=1))
    with pytest.raises(UserError, match=r"sources\[1\].path: lost gave no text.*one JSON object per line"):
        build("good", "lost")
    (tmp_path / "lost/b.jsonl").write_text("")
    with pytest.raises(UserError, match=r"sources\[1\].path: lost gave no text: of 1 empty file"):
        build("good", "lost")
    write(tmp_path / "good/b.jsonl", [*CODE, *CODE])
    assert build("good").domains["prose"].splits["train"].documents > 100


@pytest.mark.parametrize("chunk_bytes", [8_000_000, 500])
def test_lost_files_are_named(tmp_path: Path, build: Callable[..., Manifest], chunk_bytes: int):
    write(tmp_path / "web/a.jsonl", PROSE)
    write(tmp_path / "web/b.jsonl", CODE[:10], "content")
    write(tmp_path / "web/copies.jsonl", PROSE[:20])
    write(tmp_path / "web/empty.jsonl", [])
    lines = (tmp_path / "web/a.jsonl").read_bytes()
    (tmp_path / "web/broken.jsonl.zst").write_bytes(
        zstandard.compress(lines) + zstandard.compress(lines)[:-9]
    )
    write(tmp_path / "web/most.jsonl", [*CODE[10:12], " ", " ", " "])
    write(tmp_path / "blank/c.jsonl", [*CODE[12:14], *" " * 7])
    manifest = build("web", "blank", chunk_bytes=chunk_bytes)
    assert losses(manifest) == [
        "web: kept 62 of 157 records (80 exact duplicate, 10 no text, 3 empty, 1 empty file)",
        "web: damaged, so that some or all of it could not be read: broken.jsonl.zst",
        "web: nothing kept of b.jsonl, copies.jsonl, empty.jsonl (20 exact duplicate, 10 no text, 1 "
        "empty file)",
        "web: less than half kept of most.jsonl (3 empty)",
        "blank: kept 2 of 9 records (7 empty)",
        "blank: less than half kept of c.jsonl (7 empty)",
    ]
    assert all(f"prose: {line}" in describe(manifest, tmp_path) for line in losses(manifest))


def test_lost_text_files_are_named(tmp_path: Path, build: Callable[..., Manifest]):
    for n, text in enumerate(PROSE):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / f"t/{n:02}.txt").write_text(text)
    for n in (3, 4):
        (tmp_path / f"t/{n:02}.txt").write_bytes("é".encode("latin-1") * 50)
    manifest = build("t", kind=SourceKind.text)
    assert losses(manifest) == ["t: nothing kept of 03.txt, 04.txt (2 encoding)"]


def test_bytes_read_are_kept_or_rejected(tmp_path: Path, build: Callable[..., Manifest]):
    write(tmp_path / "web/a.jsonl", [*PROSE, PROSE[0]])
    bad = b'{"text": "cut off\n{"other": 1}\n'
    (tmp_path / "web/b.jsonl").write_bytes(bad)
    manifest = build("web")
    record = manifest.domains["prose"]
    kept = sum(len(text.strip().encode()) + 1 for text in PROSE)
    assert sum(split.text_bytes for split in record.splits.values()) == kept
    lost = len(PROSE[0].strip().encode()) + 1 + len(bad)
    assert record.rejected_bytes == lost
    line = f"read 63 records of {kept + lost:,} bytes, kept 60 records of {kept:,} bytes"
    assert f"{line}, rejected 3 records of {lost:,} bytes" in describe(manifest, tmp_path)
