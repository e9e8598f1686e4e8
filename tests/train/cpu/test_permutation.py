"""Permutation of tokens on CPUs against MegaBlocks' own Triton kernels and plain PyTorch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.cpu.triton_reference import permuted
from train.cpu import permutation
from train.model import megablocks_ops

pytestmark = pytest.mark.slow

# experts, top_k, experts that get tokens, precision
CASES = {
    "top1": (5, 1, range(5), torch.float32),
    "top2": (5, 2, range(5), torch.float32),
    "top4": (6, 4, range(6), torch.float32),
    "idle experts": (8, 2, (1, 2, 6), torch.float32),
    "one expert takes all": (4, 1, (2,), torch.float32),
    "bf16": (6, 4, range(6), torch.bfloat16),
}
TOKENS, WIDTH = 7, 40


def make_case(
    experts: int, top_k: int, busy: tuple[int, ...] | range, dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(experts)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    choices = [
        torch.tensor(list(busy))[torch.randperm(len(busy), generator=generator)[:top_k]]
        for _ in range(TOKENS)
    ]
    return {
        "top_k": torch.tensor(top_k),
        "bins": torch.zeros(experts),
        "experts_R": torch.cat(choices).int(),
        "x_TD": randn(TOKENS, WIDTH),
        "weights_R": randn(TOKENS * top_k),
        "grad_RD": randn(TOKENS * top_k, WIDTH),
    }


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("triton")
    torch.save([make_case(*case) for case in CASES.values()], folder / "cases.pt")
    root = Path(__file__).parents[3]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.train.cpu.triton_reference",
            folder / "cases.pt",
            folder / "results.pt",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        check=True,
    )
    return dict(zip(CASES, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_permutation_and_its_gradients_equal_tritons(
    name: str, triton_results: dict[str, dict[str, Tensor]]
) -> None:
    ours, theirs = permuted(make_case(*CASES[name])), triton_results[name]
    # The kernels round each bf16 row before adding K of them; ours add in fp32 and round once.
    tolerance = {"rtol": 2e-2, "atol": 4e-2} if name == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    assert ours.keys() == theirs.keys()
    for result in ours:
        torch.testing.assert_close(
            ours[result], theirs[result], **tolerance, msg=lambda m, r=result: f"{r}: {m}"
        )


def test_float64_is_not_rounded_on_the_way() -> None:
    case = make_case(5, 2, range(5), torch.float32)
    single = permuted(case)
    double = permuted({name: t.double() if t.is_floating_point() else t for name, t in case.items()})
    for name, tensor in double.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor.float(), single[name])


@pytest.mark.parametrize("function", [permutation.sort, megablocks_ops.sort.plain], ids=["cpu", "plain"])
@pytest.mark.parametrize("largest", [15, 255, 256, 70_000])
def test_sort_is_stable(largest: int, function: Callable[..., None]) -> None:
    x = torch.randint(0, largest + 1, (500,), dtype=torch.int32)
    x[0] = largest
    values, places = torch.empty_like(x), torch.empty_like(x)
    function(x, 32, values, places)
    expected = sorted(range(500), key=lambda place: int(x[place]))
    assert places.tolist() == expected
    assert torch.equal(values, x[expected])


def test_sort_of_nothing() -> None:
    x = torch.empty(0, dtype=torch.int32)
    megablocks_ops.sort(x, 4, torch.empty_like(x), torch.empty_like(x))
