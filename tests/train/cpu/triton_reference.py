"""Reference results of MegaBlocks' own Triton kernels, run as a program under TRITON_INTERPRET=1.

Usage: python triton_reference.py CASES.pt RESULTS.pt, where a case is a dict of tensors and ``top_k``.
"""

import sys

import torch
from torch import Tensor

from train.model import megablocks_ops

megablocks_ops.install()

from megablocks import ops  # noqa: E402
from megablocks.backend import kernels  # noqa: E402


def permuted(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs MegaBlocks' gather and scatter with their gradients, with whatever kernels are installed."""
    top_k = int(case["top_k"])
    experts = case["bins"].numel()
    bin_ids, indices = ops.sort(case["experts_R"], max(experts - 1, 1).bit_length())
    bins = ops.inclusive_cumsum(ops.histogram(case["experts_R"], experts), 0).view(-1)
    x = case["x_TD"].clone().requires_grad_()
    weights = case["weights_R"].clone().requires_grad_()
    rows = ops.gather(x, indices, bin_ids, bins, top_k)
    rows.backward(case["grad_RD"])
    y = case["grad_RD"].clone().requires_grad_()
    out = ops.scatter(y, indices, bin_ids, weights, bins, top_k)
    out.backward(case["x_TD"])
    plain = ops.scatter(case["grad_RD"], indices, bin_ids, None, bins, top_k)
    results = {"rows": rows, "grad_x": x.grad, "out": out, "grad_y": y.grad, "grad_weights": weights.grad}
    return {name: tensor.detach() for name, tensor in (results | {"plain": plain}).items()}


if __name__ == "__main__":
    for name in ("gather", "scatter", "scatter_wgrad"):
        setattr(kernels, name, getattr(kernels, name).plain)
    torch.save([permuted(case) for case in torch.load(sys.argv[1])], sys.argv[2])
