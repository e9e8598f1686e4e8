"""Every file of a source is read, once; leftovers and other splits are passed over and named."""

import json
import os
from pathlib import Path

import pytest

from data.text.file_listing import files_of
from data.text.inputs import cut, list_inputs
from train.recipe.errors import UserError
from train.recipe.preparation import Source, SourceKind

FACTS = {"dataset": "tales", "version": "1", "origin": "here", "licence": "CC0-1.0"}


def source(path: Path | str, kind: SourceKind = SourceKind.jsonl) -> Source:
    return Source(domain="web", kind=kind, path=str(path), **FACTS)


def listed(path: Path | str, kind: SourceKind = SourceKind.jsonl) -> list[str]:
    return [file.name for file in list_inputs(0, source(path, kind), None)]


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}\n")


@pytest.mark.parametrize("kind", list(SourceKind))
@pytest.mark.parametrize(
    "pattern, kept",
    [
        ("*", "2021/x 2021/a/x 2021/a/b/x 2022/x 2022/a/x 2022/a/b/x y"),
        ("", "2021/x 2021/a/x 2021/a/b/x 2022/x 2022/a/x 2022/a/b/x y"),
        ("**", "2021/x 2021/a/x 2021/a/b/x 2022/x 2022/a/x 2022/a/b/x y"),
        ("202?", "2021/x 2021/a/x 2021/a/b/x 2022/x 2022/a/x 2022/a/b/x"),
        ("*/a", "2021/a/x 2021/a/b/x 2022/a/x 2022/a/b/x"),
        ("*/*/b", "2021/a/b/x 2022/a/b/x"),
        ("2021/*", "x a/x a/b/x"),
        ("2021/a", "x b/x"),
        ("y*", "y"),
    ],
)
def test_files_of_the_same_name_stay_apart(tmp_path: Path, kind: SourceKind, pattern: str, kept: str):
    others = {SourceKind.parquet: ".parquet", SourceKind.mds: ".mds", SourceKind.megatron: ".bin"}
    suffix = others.get(kind, ".jsonl")
    every = ["2021/x", "2021/a/x", "2021/a/b/x", "2022/x", "2022/a/x", "2022/a/b/x", "y"]
    if kind is SourceKind.megatron:
        write(tmp_path, *(name + ".idx" for name in every))
    write(tmp_path, *(name + suffix for name in every))
    assert sorted(listed(tmp_path / pattern, kind)) == sorted(name + suffix for name in kept.split())


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path):
    write(tmp_path, "run [1]/x.jsonl", "run 1/y.jsonl")
    assert listed(tmp_path / "run [1]") == ["x.jsonl"]
    assert list(files_of(str(tmp_path / "run [1]/x.jsonl"))) == ["x.jsonl"]


def test_linked_folders_are_read_and_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, "disk/x.jsonl", "src/own.jsonl", "src/new/z.jsonl")
    (tmp_path / "src/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "src/circle").symlink_to(tmp_path / "src")
    (tmp_path / "src/new/again.jsonl").hardlink_to(tmp_path / "src/own.jsonl")
    os.mkfifo(tmp_path / "src/pipe.jsonl")
    assert listed(tmp_path / "src") == ["linked/x.jsonl", "new/again.jsonl", "new/z.jsonl"]
    (tmp_path / "src/gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data.sources\[0\].path: .*gone.jsonl can't be read"):
        listed(tmp_path / "src")


def test_what_the_kind_does_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write(tmp_path, "a.jsonl", "b.csv", "c/d.parquet", "README.md", ".hidden/e.csv")
    assert listed(tmp_path) == ["a.jsonl"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "passed over README.md, b.csv, c/d.parquet" in line and "e.csv" not in line


def test_a_pipe_is_no_source(tmp_path: Path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"data.sources\[0\].path: a.jsonl: no regular file"):
        listed(tmp_path / "a.jsonl")


def test_text_files_are_cut_in_one_pass(tmp_path: Path):
    write(tmp_path, *(f"{n:04}.txt" for n in range(500)))
    files = list_inputs(0, source(tmp_path, SourceKind.text), None)
    chunks = cut([files], [SourceKind.text], 2 * files[0].bytes)
    assert [file for chunk in chunks for file in chunk.inputs] == files
    assert {len(chunk.inputs) for chunk in chunks} == {2}


def saved(folder: Path, *files: str) -> None:
    write(folder, *files)
    entries = {"_data_files": [{"filename": name} for name in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(entries))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("above", ["", "deep/er/"])
def test_what_map_left_in_a_saved_dataset_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, above: str
):
    saved(tmp_path / above, "data-00000-of-00001.arrow")
    write(tmp_path / above, "cache-0123.arrow", "tmpabc.arrow")
    write(tmp_path, "other/x.parquet")
    assert listed(tmp_path, SourceKind.hf) == sorted([f"{above}data-00000-of-00001.arrow", "other/x.parquet"])
    assert f"passed over {above}cache-0123.arrow, {above}tmpabc.arrow" in caplog.text
    (tmp_path / above / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks data-00000-of-00001.arrow, which its state.json lists"):
        listed(tmp_path, SourceKind.hf)


@pytest.mark.parametrize("above", ["", "sets/two/"])
def test_only_the_training_split_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, above: str):
    root = tmp_path / above
    for split in ("train", "test", "validation"):
        saved(root / split, "data-0.arrow")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test", "validation"]}')
    assert listed(tmp_path, SourceKind.hf) == [f"{above}train/data-0.arrow"]
    assert "not test (1 files), validation (1 files)" in caplog.text
    assert listed(root / "test", SourceKind.hf) == ["data-0.arrow"]
    (root / "dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    with pytest.raises(UserError, match=r"has the splits test, validation, and none is called train"):
        listed(tmp_path, SourceKind.hf)
    (root / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert listed(tmp_path, SourceKind.hf) == [f"{above}test/data-0.arrow"]
    (root / "dataset_dict.json").write_text('{"splits": ["train", ')
    with pytest.raises(UserError, match=r"dataset_dict.json can't be read"):
        listed(tmp_path, SourceKind.hf)


@pytest.mark.parametrize(
    "train, held_out",
    [
        ("data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("train/a.parquet", "validation/a.parquet"),
        ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
        ("x.train.jsonl", "x.dev.jsonl"),
    ],
)
def test_splits_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, held_out: str):
    write(tmp_path, train, held_out, "more/contest.jsonl")
    assert listed(tmp_path, SourceKind.hf) == sorted([train, "more/contest.jsonl"])
    assert f"reads the split train, not {held_out}" in caplog.text
    (tmp_path / train).unlink()
    assert held_out in listed(tmp_path, SourceKind.hf)


def test_test_sets_beside_training_files_are_named_in_other_kinds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(tmp_path, "train.jsonl", "test.jsonl")
    assert listed(tmp_path) == ["test.jsonl", "train.jsonl"]
    assert "reads test.jsonl as training text" in caplog.text
