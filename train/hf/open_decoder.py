"""Loading of a decoder with its weights, whole on one device, from any source of weights."""

from dataclasses import replace
from pathlib import Path

import torch

from train.hf.average_option import Average
from train.hf.initial_weights import fill
from train.hf.weights import WeightSource, open_weights
from train.model.decoder import Decoder


def open_decoder(
    path: Path,
    checkpoint: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    average: Average | None = None,
) -> tuple[Decoder, WeightSource]:
    """Builds a decoder and loads its weights.

    Args:
        path: a run, a checkpoint, an imported folder or a Hugging Face folder.
        checkpoint: name of a run's checkpoint; None: the newest complete one.
        device: cpu or cuda; None: cuda if available.
        dtype: data type of the weights.
        average: an average of a run's weights instead of them.

    Raises:
        UserError: if there are no weights, or they are damaged.
    """
    source = open_weights(path, checkpoint, average)
    # Only training uses multi-token prediction.
    decoder = Decoder(replace(source.model, mtp=False), device="meta")
    decoder.to(dtype)
    decoder.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for buffer in decoder.buffers():
        buffer.zero_()
    fill(decoder, source)
    return decoder.eval(), source
