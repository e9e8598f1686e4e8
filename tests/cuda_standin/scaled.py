"""Experts in block-scaled fp8 on one GPU of the stand-in, both passes; prints JSON.

`python -m tests.cuda_standin.scaled PRECISION D F ROWS...`: rows of each expert.
"""

import json
import sys
from typing import Any

import torch

from tests.cuda_standin import inside
from train.model.experts import spans_of
from train.model.scaled_glu import scaled_glu
from train.model.scaled_products import Products, ran, require_kernels
from train.recipe.errors import UserError
from train.recipe.schema import ExpertPrecision

precision, (D, F, *sizes) = ExpertPrecision(sys.argv[1]), map(int, sys.argv[2:])


def refusal(wanted: ExpertPrecision) -> str:
    """Returns the line by which a precision is refused; empty if it is not."""
    try:
        require_kernels(wanted, "cuda", is_bf16=True)
    except UserError as error:
        return str(error)
    return ""


inside.prepare()
refusals = {each.value: refusal(each) for each in ExpertPrecision}
found: dict[str, Any] = {"refusals": refusals}
if not refusals[precision.value]:
    products = Products(precision, spans_of(torch.tensor(sizes).cumsum(0)))
    rows, w1, v1, w2 = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for shape in ((sum(sizes), D), *[(len(sizes), F, D)] * 3)
    )
    for _ in range(2):  # The first loads kernels.
        inside.reset()
        ran.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with inside.Waits() as waits:
            out = scaled_glu(rows, w1, v1, w2, products)
            out.sum().backward()
        found["peak"] = torch.cuda.max_memory_allocated() - before
        for tensor in (rows, w1, v1, w2):
            tensor.grad = None
    found |= {"counts": inside.counts(), "ran": ran, "waits": waits.places}
print(json.dumps(found), flush=True)
