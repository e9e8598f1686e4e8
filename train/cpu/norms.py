"""Layer normalisation on a CPU. torch's kernel adds up the gradients of a bf16 weight in bf16, row by row.

Its error grows with the number of rows: of 512 it is 5 unit roundoffs, where a GPU's kernel, which adds in
fp32, has half of one.
"""

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """:func:`train.model.norms.layer_norm` in fp32 or wider; results and gradients are rounded once."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight_D.dtype), torch.float32)
    return functional.layer_norm(x.to(dtype), weight_D.shape, weight_D.to(dtype), None, eps).to(x.dtype)
