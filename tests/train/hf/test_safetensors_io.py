"""Files of safetensors: what counts as a number, and several files at a time."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launch.verify.forked_ranks import run_ranks
from train.hf.safetensors_io import (
    BLOCK_BYTES,
    MOST_SPARE_BLOCKS,
    TensorInfo,
    all_finite,
    make_header,
    new_rows,
    write_files,
)
from train.recipe.errors import UserError
from train.recipe.topology import Topology

INFOS = [TensorInfo(f"t{number}", torch.float32, (40, 3)) for number in range(6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_finite_agrees_with_torch_for_every_number_of_16_bits(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    told = torch.tensor([all_finite(number.view(1)) for number in numbers])
    assert torch.equal(told, torch.isfinite(numbers))


def test_all_finite_of_32_bits() -> None:
    huge = torch.finfo(torch.float32).max
    block = torch.tensor([[huge, huge], [-huge, -0.0]])
    assert all_finite(block) and all_finite(block.t())
    for bad in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        for row, column in ((0, 0), (1, 1)):
            spoiled = block.clone()
            spoiled[row, column] = bad
            assert not all_finite(spoiled)


def test_memory_is_used_again_only_when_no_tensor_holds_it() -> None:
    first = new_rows((4, 5), torch.float32)
    part = first[1:2].view(-1)
    part.fill_(7)
    address = first.data_ptr()
    del first
    others = [new_rows((4, 5), torch.float32) for _ in range(2 * MOST_SPARE_BLOCKS)]
    for number, other in enumerate(others):
        other.fill_(number)
    assert part.tolist() == [7.0] * 5, "is held by a view"
    assert all((other == number).all() for number, other in enumerate(others))
    del part, other, others
    assert address in {new_rows((3,), torch.bfloat16).data_ptr() for _ in range(2)}
    whole = new_rows((BLOCK_BYTES,), torch.float32)
    assert whole.shape == (BLOCK_BYTES,) and not whole.any()
    assert new_rows((0, 3), torch.bfloat16).shape == (0, 3)


def test_forked_processes_do_not_share_it() -> None:
    new_rows((2,), torch.int32).fill_(1)  # Memory that is there to be used again.

    def work(topology: Topology) -> int:
        mine = new_rows((2,), torch.int32)
        mine.fill_(topology.rank)
        torch.distributed.barrier()
        return int(mine.sum())

    assert run_ranks(2, work) == [0, 2]


def _value(number: int) -> Tensor:
    return torch.full((40, 3), float(number))


def test_files_written_side_by_side_are_each_whole(tmp_path: Path) -> None:
    jobs = {
        f"{number}.safetensors": (make_header([info]), _value(number).split(7))
        for number, info in enumerate(INFOS)
    }
    digests = dict(write_files(tmp_path, jobs))
    assert len(digests) == len(INFOS)
    for number, info in enumerate(INFOS):
        file = tmp_path / f"{number}.safetensors"
        assert digests[file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert torch.equal(load_file(file)[info.name], _value(number))


def test_an_error_in_one_file_leaves_nothing_half_written(tmp_path: Path) -> None:
    def failing() -> Iterator[Tensor]:
        yield _value(0)[:5]
        raise UserError("broken")

    def endless() -> Iterator[Tensor]:
        while True:
            yield _value(1)[:5]

    jobs = {
        name: (make_header(INFOS[:1]), blocks) for name, blocks in {"a": failing(), "b": endless()}.items()
    }
    with pytest.raises(UserError, match="broken"):
        list(write_files(tmp_path, jobs))
    assert not list(tmp_path.iterdir())
