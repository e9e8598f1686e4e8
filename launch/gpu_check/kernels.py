"""Checks of a device's kernels against plain float64 definitions on the CPU.

On a GPU these are MegaBlocks' Triton kernels (gather, scatter, their gradients), the experts with torch's
grouped product, the loss's and, if compiled, MegaBlocks' extension. On a CPU they are those of train/cpu.

Shapes: T tokens, K experts per token, R = T x K routed rows, D width, F hidden, E experts.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from launch.gpu_check.rows import CheckRow, deviation_row
from train.model import megablocks_ops
from train.model.experts import grouped_glu
from train.model.loss import IGNORE, chunked_cross_entropy

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error relative to the largest value: rounding of the type over sums of some hundred terms."""


def check_kernels(device: str, tokens: int = 4096, width: int = 1024) -> list[CheckRow]:
    """Checks every kernel in fp32 and bf16, with idle experts and with one expert that gets all tokens."""
    megablocks_ops.install()
    rows = []
    for dtype, bound in BOUNDS.items():
        for routing, busy in (("2 of 16 idle", range(14)), ("one takes all", range(1))):
            worst: dict[str, float] = {}
            for name, got, wanted in _pairs(device, dtype, tokens, width, list(busy)):
                worst[name] = max(worst.get(name, 0.0), relative_error(got, wanted))
            label = f"{str(dtype).removeprefix('torch.')}, {routing}"
            rows += [
                deviation_row("kernels", f"{name} ({label})", error, bound) for name, error in worst.items()
            ]
        label = str(dtype).removeprefix("torch.")
        rows += [
            deviation_row("kernels", f"{name} ({label})", relative_error(got, wanted), bound)
            for name, got, wanted in _loss(device, dtype)
        ]
    return rows


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference over the largest wanted value; infinity if that is NaN."""
    difference = (got.detach().cpu().double() - wanted.double()).abs().max()
    error = float(difference / wanted.double().abs().max().clamp(min=1e-30))
    return float("inf") if math.isnan(error) else error


def _pairs(
    device: str, dtype: torch.dtype, tokens: int, width: int, busy: list[int], experts: int = 16
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, result on the device and float64 reference."""
    top_k = min(4, len(busy))
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    choices_TK = torch.rand(tokens, len(busy), generator=generator).argsort(dim=1)[:, :top_k]
    experts_R = torch.tensor(busy)[choices_TK].reshape(-1).int()
    x_TD, weights_R = randn(tokens, width), randn(tokens * top_k)
    yield from _permutation(device, experts_R, experts, x_TD, weights_R, randn(tokens * top_k, width))
    counts_E = torch.bincount(experts_R, minlength=experts)
    yield from _experts(device, counts_E, randn)


def _permutation(
    device: str, experts_R: Tensor, experts: int, x_TD: Tensor, weights_R: Tensor, rows_RD: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    from megablocks import ops

    tokens, rows = x_TD.shape[0], experts_R.numel()
    top_k = rows // tokens
    order_R = torch.sort(experts_R, stable=True).indices
    on = experts_R.to(device)
    bin_ids, indices = ops.sort(on, max(experts - 1, 1).bit_length())
    yield "sort", indices, order_R
    counts = ops.histogram(on, experts)
    yield "histogram", counts, torch.bincount(experts_R, minlength=experts)
    bins = ops.inclusive_cumsum(counts, 0).view(-1)

    x = x_TD.to(device).requires_grad_()
    gathered = ops.gather(x, indices, bin_ids, bins, top_k)
    gathered.backward(rows_RD.to(device))
    x_double, sorted_rows = x_TD.double(), rows_RD.double()
    yield "gather", gathered, x_double[order_R // top_k]
    gradient_TD = torch.zeros_like(x_double).index_add_(0, order_R // top_k, sorted_rows)
    yield "gather's gradient", _gradient(x), gradient_TD

    y, weights = rows_RD.to(device).requires_grad_(), weights_R.to(device).requires_grad_()
    scattered = ops.scatter(y, indices, bin_ids, weights, bins, top_k)
    scattered.backward(x_TD.to(device))
    scale_R1 = weights_R.double()[order_R].unsqueeze(1)
    out_TD = torch.zeros_like(x_double).index_add_(0, order_R // top_k, sorted_rows * scale_R1)
    yield "scatter", scattered, out_TD
    yield "scatter's gradient", _gradient(y), x_double[order_R // top_k] * scale_R1
    products_R = (sorted_rows * x_double[order_R // top_k]).sum(dim=1)
    weights_gradient_R = torch.empty(rows, dtype=torch.float64)
    weights_gradient_R[order_R] = products_R
    yield "scatter's gradient of weights", _gradient(weights), weights_gradient_R


def _experts(
    device: str, counts_E: Tensor, randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    rows, width, hidden = int(counts_E.sum()), 256, 128
    shapes = {"rows": (rows, width)} | {name: (len(counts_E), hidden, width) for name in ("w1", "v1", "w2")}
    drawn = {name: randn(*shape) for name, shape in shapes.items()}
    exact = {name: value.double().requires_grad_() for name, value in drawn.items()}
    given = {name: value.to(device).requires_grad_() for name, value in drawn.items()}
    gradient_RD = randn(rows, width)
    x, w1, v1, w2 = given.values()
    out = grouped_glu(x, w1, v1, w2, counts_E.to(device))
    out.backward(gradient_RD.to(device))
    x_RD, w1_EFD, v1_EFD, w2_EFD = exact.values()
    expected = torch.cat(
        [
            (functional.silu(part @ w1.t()) * (part @ v1.t())) @ w2
            for part, w1, v1, w2 in zip(x_RD.split(counts_E.tolist()), w1_EFD, v1_EFD, w2_EFD, strict=True)
        ]
    )
    expected.backward(gradient_RD.double())
    yield "experts", out, expected.detach()
    for name in shapes:
        yield f"experts' gradient of {name}", _gradient(given[name]), _gradient(exact[name])


def _loss(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The loss of some tokens in chunks; the vocabulary fills no block of columns."""
    tokens, width, vocabulary, chunk = 256, 64, 20_001, 100
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, width, generator=generator).to(dtype)
    weight_VD = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator)
    targets_T[::7] = IGNORE
    exact = [tensor.double().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    given = [tensor.to(device).requires_grad_() for tensor in (hidden_TD, weight_VD)]
    total, losses_T = chunked_cross_entropy(given[0], given[1], targets_T.to(device), chunk)
    total.backward()
    expected_T = functional.cross_entropy(exact[0] @ exact[1].t(), targets_T, reduction="none")
    expected_T.sum().backward()
    yield "loss", losses_T, expected_T.detach()
    for name, mine, other in zip(("hidden states", "weight"), given, exact, strict=True):
        yield f"loss's gradient of {name}", _gradient(mine), _gradient(other)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
