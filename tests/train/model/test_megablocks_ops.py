"""The leaf operations against MegaBlocks' own Triton kernels, its own GLU, and their definitions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.train.model.triton_reference import permuted
from train.cpu.grouped_glu import grouped_glu
from train.model import megablocks_ops

megablocks_ops.install()

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
            "tests.train.model.triton_reference",
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
    # The kernels round each bf16 row before they add K of them; ours add in fp32 and round once.
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


@pytest.mark.parametrize("largest", [15, 255, 70_000])
def test_sort_is_stable(largest: int) -> None:
    x = torch.randint(0, largest + 1, (500,), dtype=torch.int32)
    x[0] = largest
    values, places = torch.empty_like(x), torch.empty_like(x)
    megablocks_ops.sort(x, 32, values, places)
    expected = sorted(range(500), key=lambda place: int(x[place]))
    assert places.tolist() == expected
    assert torch.equal(values, x[expected])


def test_sort_of_nothing() -> None:
    x = torch.empty(0, dtype=torch.int32)
    megablocks_ops.sort(x, 4, torch.empty_like(x), torch.empty_like(x))


def test_counts_and_running_sums() -> None:
    x = torch.tensor([3, 0, 3, 1], dtype=torch.int32)
    assert megablocks_ops.histogram(x, 5).tolist() == [1, 1, 0, 2, 0]
    assert megablocks_ops.histogram(x, 5).dtype == torch.int32
    inclusive, exclusive = torch.empty(1, 4, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32)
    megablocks_ops.inclusive_cumsum(x.view(1, 4), 1, inclusive)
    megablocks_ops.exclusive_cumsum(x.view(1, 4), 1, exclusive)
    assert inclusive.tolist() == [[3, 3, 6, 7]]
    assert exclusive.tolist() == [[0, 3, 3, 6]]


def test_replicate_repeats_columns_and_sums_them_back() -> None:
    x, ends = torch.tensor([[5, 6, 7]]), torch.tensor([2, 2, 5], dtype=torch.int32)
    out = torch.empty(1, 5, dtype=x.dtype)
    megablocks_ops.replicate_forward(x, ends, out)
    assert out.tolist() == [[5, 5, 7, 7, 7]]
    back = torch.empty_like(x)
    megablocks_ops.replicate_backward(torch.tensor([[1, 2, 3, 4, 5]]), ends, back)
    assert back.tolist() == [[3, 0, 12]]


SIZES = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 2, 70, 0], [64, 64, 0, 64], [0, 0, 0, 0])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("trans_b", [False, True])
def test_grouped_product_and_gradients_equal_a_loop(sizes: list[int], trans_b: bool) -> None:
    a = torch.randn(sum(sizes), 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, *((5, 6) if trans_b else (6, 5)), dtype=torch.float64, requires_grad=True)
    out = megablocks_ops.gmm(a, b, torch.tensor(sizes), trans_b)
    expected = torch.cat([rows @ (b[e].t() if trans_b else b[e]) for e, rows in enumerate(a.split(sizes))])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (a, b), grad)
    theirs = torch.autograd.grad(expected, (a, b), grad)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_glu_equals_a_loop(sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    width, hidden, experts = 24, 40, 4

    def randn(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()

    inputs = [randn(sum(sizes), width), *(randn(experts, hidden, width) for _ in range(3))]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, w1, v1, w2 = exact
    expected = torch.cat(
        [
            (functional.silu(rows @ w1[e].t()) * (rows @ v1[e].t())) @ w2[e]
            for e, rows in enumerate(x.split(sizes))
        ]
    )
    out = grouped_glu(*inputs, torch.tensor(sizes))
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    theirs = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().amax().item() if other.numel() else 1.0
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=tolerance * max(scale, 1e-9))


def test_grouped_glu_equals_megablocks_own() -> None:
    from megablocks.layers import glu

    sizes = torch.tensor([3, 0, 9])
    inputs = [torch.randn(12, 8, requires_grad=True)] + [
        torch.randn(3, 16, 8, requires_grad=True) for _ in range(3)
    ]
    results = []
    for function in (glu.memory_optimized_grouped_glu, glu.memory_optimized_grouped_glu.elsewhere):
        out = function(*inputs, sizes, functional.silu)
        # MegaBlocks writes its input's gradient over the output's.
        results.append(
            [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, 96).view(12, 8).clone())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_grouped_products_are_bf16_and_weight_gradients_fp32() -> None:
    x, w = torch.randn(6, 8), torch.randn(2, 16, 8, requires_grad=True)
    sizes = torch.tensor([2, 4])
    with torch.autocast("cpu", torch.bfloat16):
        assert megablocks_ops.gmm(x, w, sizes, trans_b=True).dtype == torch.bfloat16
        out = grouped_glu(x, w, w, w, sizes)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


def test_installing_again_changes_nothing() -> None:
    from megablocks.backend import kernels
    from megablocks.layers import glu

    before = [sys.modules["megablocks_ops"], kernels.gather, glu.memory_optimized_grouped_glu]
    megablocks_ops.install()
    assert before == [sys.modules["megablocks_ops"], kernels.gather, glu.memory_optimized_grouped_glu]


def test_a_compiled_module_is_left_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "grouped_gemm.py").write_text("COMPILED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "grouped_gemm")
    megablocks_ops.install()
    import grouped_gemm

    assert grouped_gemm.COMPILED
