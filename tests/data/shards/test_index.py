"""An index's table equals the index for any kind of shard, and is rewritten when the index changes."""

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from data.shards.index import PackedFile, ShardFile, ShardIndex, open_index
from data.text.mds import column_config, index_text

SHARDS = 500


def file_entry(name: str, number: int) -> dict[str, Any]:
    # A hash may end in zeros, which must be kept.
    sha256 = hashlib.sha256(name.encode()).hexdigest()[: 64 - 2 * (number % 3)].ljust(64, "0")
    return {"basename": name, "bytes": 2**31 + number, "hashes": {"sha256": sha256} if number % 7 else {}}


def entries(count: int) -> list[dict[str, Any]]:
    """Returns shards of two kinds, one of them compressed, some without a hash."""
    made = []
    for n in range(count):
        level = 3 if n % 5 == 0 else None
        zipped = file_entry(f"shard.{n:05}.mds.zstd", n + 1) if level else None
        raw = file_entry(f"shard.{n:05}.mds", n)
        made.append(column_config(16, level) | {"raw_data": raw, "zip_data": zipped, "samples": 4000 + n % 3})
    return made


def expected(folder: Path, entry: dict[str, Any]) -> ShardFile:
    def facts(file: dict[str, Any]) -> tuple[Path, int, str | None]:
        return folder / file["basename"], file["bytes"], file["hashes"].get("sha256")

    zipped = entry["zip_data"]
    return ShardFile(
        *facts(entry["raw_data"]), PackedFile(*facts(zipped), entry["compression"]) if zipped else None
    )


def check(index: ShardIndex, folder: Path, made: list[dict[str, Any]]) -> None:
    assert list(index) == [expected(folder, entry) for entry in made]
    assert index.samples.tolist() == [entry["samples"] for entry in made]
    for number in range(0, len(made), 7):
        config = index.configs[index.config_of(number)]
        assert config.items() <= made[number].items() and config["compression"] == made[number]["compression"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats every index as large."""
    monkeypatch.setattr("data.shards.index.SMALL_BYTES", 0)


def tables(folder: Path) -> list[Path]:
    return list(folder.glob(".index-*.table*"))


@pytest.mark.parametrize("text", [index_text, lambda it: json.dumps({"version": 2, "shards": it}, indent=1)])
def test_a_table_says_what_the_index_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any) -> None:
    made = entries(SHARDS)
    (tmp_path / "index.json").write_text(text(made))
    check(open_index(tmp_path), tmp_path, made)
    assert not tables(tmp_path)
    monkeypatch.setattr("data.shards.index.SMALL_BYTES", 0)
    check(open_index(tmp_path), tmp_path, made)
    assert len(tables(tmp_path)) == 1
    monkeypatch.setattr("data.shards.index._parsed", None)
    check(open_index(tmp_path), tmp_path, made)


def test_another_index_gets_another_table(tmp_path: Path, large: None) -> None:
    for count in (3, 0, 5):
        (tmp_path / "index.json").write_text(index_text(entries(count)))
        check(open_index(tmp_path), tmp_path, entries(count))
        assert len(tables(tmp_path)) == 1
    # The same size at another time.
    text = index_text(entries(5)).replace("4001", "4009")
    (tmp_path / "index.json").write_text(text)
    os.utime(tmp_path / "index.json", ns=(1, 1))
    assert 4009 in open_index(tmp_path).samples


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path: Path, large: None) -> None:
    (tmp_path / "index.json").write_text(index_text(entries(9)))
    (tmp_path / ".index.lock").mkdir()
    check(open_index(tmp_path), tmp_path, entries(9))
    assert not tables(tmp_path)


def test_of_many_processes_one_parses(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import data.shards.index

    (tmp_path / "index.json").write_text(index_text(entries(SHARDS)))
    parse = data.shards.index._parsed

    def noted(folder: Path, text: str) -> ShardIndex:
        (tmp_path / f"parsed-by-{os.getpid()}").touch()
        return parse(folder, text)

    monkeypatch.setattr("data.shards.index._parsed", noted)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for found in pool.map(_files, [tmp_path] * 8, chunksize=1):
            assert found == [expected(tmp_path, entry) for entry in entries(SHARDS)]
    assert len(list(tmp_path.glob("parsed-by-*"))) == 1


def _files(folder: Path) -> list[ShardFile]:
    return list(open_index(folder))


@pytest.mark.parametrize("cut", [10, 300, 1])
def test_an_index_that_was_cut_short_is_no_index(tmp_path: Path, large: None, cut: int) -> None:
    (tmp_path / "index.json").write_text(index_text(entries(3))[:-cut])
    with pytest.raises((ValueError, LookupError)):
        open_index(tmp_path)
    assert not tables(tmp_path)
