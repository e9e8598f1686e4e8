"""Router noise that depends only on seed, layer, position in training and column: equal under every layout.

A generator's state depends on how often each rank drew from it. Here each number is a hash of its place, as
in counter-based generators (Salmon et al. 2011), so a resumed, recomputed or resharded run draws it again.

Shapes: B sequences, S tokens per sequence, T = B x S, D columns.
"""

import torch
from torch import Tensor

LOW_BITS = 32


def noise_key(seed: int, layer: int, device: torch.device) -> Tensor:
    """Returns the key of a layer's noise, a scalar on the device; layers draw different noise.

    A tensor, since torch.compile would compile a layer again for every number.
    """
    # torch.full fills on the device; a copy from the host would wait for a GPU.
    return mix(torch.full((), seed * 1_000_003 + layer, device=device))


def uniform_noise(
    positions_B: Tensor, tokens: int, columns: int, key: Tensor, place_S: Tensor | None = None
) -> Tensor:
    """Draws numbers in [0, 1), fp32 [T, D].

    Args:
        positions_B: each sequence's position in training, int64.
        tokens: T; a multiple of B.
        columns: D.
        key: from :func:`noise_key`.
        place_S: places of the tokens in each sequence, int64; None: they are whole.
    """
    device = positions_B.device
    if place_S is None:
        place_S = torch.arange(tokens // positions_B.shape[0], device=device)
    key_B = mix(positions_B) ^ mix(positions_B >> LOW_BITS)
    key_B = mix(key_B ^ key)
    key_BS = mix(key_B[:, None] ^ mix(place_S))
    columns_D = mix(torch.arange(columns, device=device) + 1)
    bits_TD = mix(key_BS.view(-1, 1) ^ columns_D)
    # The upper 24 bits, which fp32 holds exactly.
    return ((bits_TD >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def mix(x: Tensor) -> Tensor:
    """Hashes 32-bit integers bijectively; every bit of the result depends on every bit of ``x``.

    Multiplies and xor-shifts with the constants that Wellons found least biased (lowbias32, 2018).
    """
    x = x.to(torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        # int32's shift is arithmetic: the mask makes it logical. Its products wrap around.
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)
