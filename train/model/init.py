"""Initial weights that depend only on the seed and the parameter's name, never on the layout.

Each parameter is drawn in blocks of rows, every block from a generator seeded with a hash of (seed,
name, block): a rank draws only the blocks that contain its rows.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.recipe import sizes
from train.recipe.schema import Model
from train.recipe.transfer import transfer_scales

BLOCK_ROWS = 4096
"""Rows of a block; for expert weights a block is one expert."""
EXPERT_WEIGHTS = ("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")
RESIDUAL_OUTPUTS = ("attn.out_proj.weight", "experts.mlp.w2", "ffn.w2.weight", "ffn.shared.w2.weight")
"""Projections into the residual stream, whose std is divided by sqrt(2 n_layers)."""


def initialize(model: nn.Module, cfg: Model, seed: int | None) -> None:
    """Fills every parameter and buffer of a decoder, sharded or not.

    Args:
        model: a :class:`train.model.decoder.Decoder` on a real device; of DTensors, local rows are filled.
        cfg: the recipe's model.
        seed: the recipe's seed; None leaves the parameters as they are, for a checkpoint to fill.
    """
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            assert name.endswith("expert_bias"), name
            buffer.zero_()
        if seed is None:
            return
        for name, parameter in model.named_parameters():
            local, first_row, first_column = own_part(parameter)
            fill_rows(
                name,
                local,
                first_row=first_row,
                first_column=first_column,
                total_rows=parameter.shape[0],
                total_columns=parameter.shape[-1],
                cfg=cfg,
                seed=seed,
            )


def own_part(weight: Tensor) -> tuple[Tensor, int, int]:
    """Returns a rank's part of a weight, and the whole's row and column that it begins with."""
    if not isinstance(weight, DTensor):
        return weight, 0, 0
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    first_row, first_column = (*offset, 0, 0)[:2]
    return weight.to_local(), first_row, first_column


def fill_rows(
    name: str,
    rows: Tensor,
    *,
    first_row: int,
    total_rows: int,
    first_column: int = 0,
    total_columns: int | None = None,
    cfg: Model,
    seed: int,
) -> None:
    """Writes rows ``first_row`` onwards of the parameter ``name`` into ``rows``.

    Args:
        name: the parameter's name in the unsharded model.
        rows: the rows to fill, [N, D] or, for a norm (ones) or a bias (zeros), [N]; some of their columns, if
            they are split too.
        first_row: index of the first of them in the unsharded parameter.
        total_rows: rows of the unsharded parameter.
        first_column: index of their first column there.
        total_columns: columns there; None: those of ``rows``.
        cfg: the recipe's model.
        seed: the recipe's seed.
    """
    if rows.dim() == 1:
        rows.fill_(0.0 if name.endswith(".bias") else 1.0)
        return
    block_rows = sizes.expert_width(cfg) if name.endswith(EXPERT_WEIGHTS) else min(BLOCK_ROWS, total_rows)
    std = cfg.init_std * transfer_scales(cfg, name).std
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * cfg.n_layers)
    last_row = first_row + rows.shape[0]
    for block in range(first_row // block_rows, -(-last_row // block_rows)):
        drawn = torch.empty(block_rows, total_columns or rows.shape[1], dtype=torch.float32)
        drawn.normal_(0.0, std, generator=_generator(seed, name, block))
        drawn = drawn[:, first_column : first_column + rows.shape[1]]
        start, end = max(first_row, block * block_rows), min(last_row, (block + 1) * block_rows)
        rows[start - first_row : end - first_row].copy_(
            drawn[start - block * block_rows : end - block * block_rows]
        )


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
