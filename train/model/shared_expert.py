"""The shared expert: a dense GLU for every token, added to the mixture's output.

Shapes: B batch, S sequence, D model, F hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.model.tensor_parallel import ColumnLinear, RowLinear, column_products


class SharedExpert(nn.Module):
    """``w2(silu(w1 x) * v1 x)``: several shared experts side by side are one (DeepSeekMoE, section 3.2).

    Sharded and reduced like a layer's other dense weights: every rank runs all of its own tokens through it.

    Args:
        d_model: width D.
        hidden_size: hidden size F.
        device: where weights are created; ``meta`` allocates nothing.
    """

    def __init__(self, d_model: int, hidden_size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.w1 = ColumnLinear(d_model, hidden_size, bias=False, device=device)
        self.v1 = ColumnLinear(d_model, hidden_size, bias=False, device=device)
        self.w2 = RowLinear(hidden_size, d_model, bias=False, device=device)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Returns the output [B, S, D]."""
        gate_BSF, up_BSF = column_products(x_BSD, self.w1, self.v1)
        out_BSD: Tensor = self.w2(functional.silu(gate_BSF) * up_BSF)
        return out_BSD
