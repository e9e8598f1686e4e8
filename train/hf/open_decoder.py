"""A decoder with its weights, whole on one device, from wherever weights are."""

from pathlib import Path

import torch

from train.hf.initial_weights import load_initial_weights
from train.hf.weights import WeightSource, open_weights
from train.model.decoder import Decoder


def open_decoder(
    path: Path, checkpoint: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, WeightSource]:
    """Builds a decoder and fills it.

    Args:
        path: a run, a checkpoint, an imported folder, or one in Hugging Face's form.
        checkpoint: of a run: which one, by name; None: the newest whole one.
        device: cpu or cuda; None: cuda where there is one.
        dtype: of the weights.

    Raises:
        UserError: if there are no weights, or they are damaged.
    """
    source = open_weights(path, checkpoint)
    decoder = Decoder(source.model, device="meta")
    decoder.to(dtype)
    decoder.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for buffer in decoder.buffers():
        buffer.zero_()
    load_initial_weights(decoder, source.path)
    return decoder.eval(), source
