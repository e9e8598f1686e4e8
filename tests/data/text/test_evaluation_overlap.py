"""Every form of task file is searched, and every file that is not is named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from data.text.evaluation_overlap import EvaluationTexts, list_evaluation_files
from data.text.words import hash_words
from train.recipe.errors import UserError

QUESTION = (
    "which of the seven small red ships came home from the northern sea with silver in the year of snow"
)
WITH_MARK = b"\xef\xbb\xbf"


def table(path: Path) -> None:
    data = pa.table({"question": [QUESTION], "choices": [[{"text": "yes"}]]})
    if path.suffix == ".parquet":
        parquet.write_table(data, path)
    else:
        with pa.ipc.new_stream(path, data.schema) as stream:
            stream.write_table(data)


def content(path: Path) -> bytes:
    kind = next(it for it in path.suffixes if it not in (".gz", ".zst"))
    row = json.dumps({"question": QUESTION, "choices": ["yes", "no"]})
    forms = {
        ".json": f"[\n{row}\n]",
        ".txt": QUESTION,
        ".csv": f'id,question\n1,"{QUESTION}"\n',
        ".tsv": f"id\tquestion\n1\t{QUESTION}\n",
    }
    return WITH_MARK + forms.get(kind, row + "\n").encode()


def write(path: Path) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    if path.suffix in (".parquet", ".arrow"):
        table(path)
    else:
        path.write_bytes(pack.get(path.suffix, bytes)(content(path)))


NAMES = [
    *(
        f"q{kind}{packed}"
        for kind in (".jsonl", ".json", ".txt", ".csv", ".tsv")
        for packed in ("", ".gz", ".zst")
    ),
    "q.parquet",
    "q.arrow",
    "q.ndjson",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_searched(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    (tmp_path / "deep").mkdir()
    (tmp_path / "notes.txt").write_text("nothing of interest is in this file of plain text\n")
    write(tmp_path / "deep" / name)
    files = list_evaluation_files([str(tmp_path)])
    assert len(files) == 2 and not caplog.records
    assert EvaluationTexts(files, 13).touches(hash_words(f"before {QUESTION} after"))


def test_files_that_are_not_searched_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path / "a.jsonl")
    for name in ("b.xlsx", "c.jsonl.bz2", "d.JSONL"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "e.jsonl").write_text("[1, 2]\n")
    assert len(list_evaluation_files([str(tmp_path)])) == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert "text of b.xlsx, c.jsonl.bz2, d.JSONL is not looked for" in first
    assert f"no text in {tmp_path / 'e.jsonl'}" in second


@pytest.mark.parametrize("name", ["q.jsonl.gz", "q.jsonl.zst", "q.parquet", "q.arrow", "q.json", "q.txt"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str):
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"\xff\xfe" + whole if name == "q.txt" else whole[: len(whole) - 12])
    with pytest.raises(UserError, match=rf"evaluation_texts: .*{name} can't be read") as caught:
        list_evaluation_files([str(tmp_path)])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="matches no file"):
        list_evaluation_files([str(tmp_path / "none")])
