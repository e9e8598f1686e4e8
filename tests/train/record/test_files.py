"""Files are written atomically, and a failed write leaves nothing."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from train.record.files import sha256, write_json, write_whole


def test_content_and_hash(tmp_path: Path) -> None:
    file = write_whole(tmp_path / "a.txt", "größer\n")
    assert file.read_text() == "größer\n"
    assert sha256(file) == hashlib.sha256("größer\n".encode()).hexdigest()
    assert write_whole(file, b"\x00\xff", sync=False).read_bytes() == b"\x00\xff"
    assert write_json(file, {"b": 1, "a": 2}, sort_keys=True).read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_file_of_before_stays_where_the_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_json(tmp_path / "a.json", [1])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(file, [2])
    assert json.loads(file.read_text()) == [1] and [path.name for path in tmp_path.iterdir()] == ["a.json"]
