"""Folders of safetensors: finite values, agreement of files and index, atomic files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.hf.folders import read_header
from train.hf.safetensors_io import (
    FilePlan,
    SafetensorsFolder,
    TensorInfo,
    check_finite,
    plan_files,
    plan_from_header,
    write_files,
    write_index,
)
from train.recipe.errors import UserError

INFOS = [TensorInfo(f"t{number}", torch.float32, (40, 3)) for number in range(6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_no_number_is_found_anywhere(dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    matrix = torch.tensor([[huge, huge], [-huge, -0.0]], dtype=dtype)
    check_finite("fine", matrix)
    for bad in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        for row, column in ((0, 0), (1, 1)):
            spoiled = matrix.clone()
            spoiled[row, column] = bad
            with pytest.raises(UserError, match=r"^spoiled: contains NaN or infinity$"):
                check_finite("spoiled", spoiled)


def _value(info: TensorInfo) -> Tensor:
    return torch.full(info.shape, float(info.name[1:]))


def test_rows_headers_and_digests_of_what_was_written(tmp_path: Path) -> None:
    files = plan_files(INFOS, 1000)  # Two tensors of 480 bytes each.
    assert [len(plan.tensors) for plan in files.values()] == [2, 2, 2]
    digests = dict(write_files(tmp_path, files, _value))
    write_index(tmp_path, files)
    folder = SafetensorsFolder(tmp_path)
    assert folder.files == list(files) == list(digests)
    for name, plan in files.items():
        file = tmp_path / name
        assert digests[name] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert plan_from_header(read_header(file)) == plan
        for info in plan.tensors:
            assert torch.equal(load_file(file)[info.name], _value(info))
            assert torch.equal(folder.read(info.name, 5, 7), _value(info)[5:7])


def test_one_memory_under_two_names_is_two_tensors(tmp_path: Path) -> None:
    same = torch.arange(120.0).view(40, 3)
    dict(write_files(tmp_path, {"model.safetensors": FilePlan(INFOS[:2])}, lambda _: same))
    assert all(torch.equal(tensor, same) for tensor in load_file(tmp_path / "model.safetensors").values())


def test_an_error_leaves_nothing_half_written(tmp_path: Path) -> None:
    def failing(info: TensorInfo) -> Tensor:
        if info is INFOS[2]:
            raise UserError("broken")
        return _value(info)

    files = {info.name: FilePlan([info]) for info in INFOS}
    finished: dict[str, str] = {}
    with pytest.raises(UserError, match="broken"):
        finished.update(write_files(tmp_path, files, failing))
    assert {file.name for file in tmp_path.iterdir()} <= {"t0"}


def test_files_and_index_must_agree(tmp_path: Path) -> None:
    for name, held in (("a", "t0"), ("b", "t1")):
        save_file({held: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for listed, words in (
        ({"t0": "a", "t1": "b", "t2": "b"}, "lists t2, which b.safetensors does not contain"),
        ({"t0": "a", "t1": "a", "t9": "b"}, "t1 is in b.safetensors, not in a.safetensors"),
        ({"t0": "a"}, None),
    ):
        weight_map = {name: f"{file}.safetensors" for name, file in listed.items()}
        index.write_text(json.dumps({"weight_map": weight_map}))
        if words is None:
            assert list(SafetensorsFolder(tmp_path).tensors) == ["t0"]
        else:
            with pytest.raises(UserError, match=words):
                SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"t0": "a.safetensors"}}))
    save_file({"t0": torch.ones(2), "surplus": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"contains surplus, which .* does not list"):
        SafetensorsFolder(tmp_path)
