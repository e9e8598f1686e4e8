"""Run by another environment's Python: exports of its own, and its transformers' logits of given exports.

`python -m tests.train.hf.other_stack GIVEN OWN LOGITS` fills the folder OWN with an export of each small
model, writes the logits of every export in GIVEN and OWN to the file LOGITS, and prints the version of
transformers.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from train.hf.check import SMALL_MODELS, export_random, open_theirs


def export_all(out: Path) -> None:
    """Exports every small model to a folder of its name."""
    for name, model in SMALL_MODELS.items():
        export_random(model, out / name)


@torch.no_grad()
def all_logits(*roots: Path) -> dict[str, Tensor]:
    """Computes the logits of the same tokens in every export with this environment's transformers."""
    logits = {}
    for folder in (folder for root in roots for folder in sorted(root.iterdir())):
        size = SMALL_MODELS[folder.name].vocab_size
        ids = torch.randint(0, size, (2, 64), generator=torch.Generator().manual_seed(2))
        logits[f"{folder.parent.name}/{folder.name}"] = open_theirs(folder)(ids).logits.contiguous()
    return logits


if __name__ == "__main__":
    given, own, file = map(Path, sys.argv[1:])
    export_all(own)
    save_file(all_logits(given, own), file)
    print(transformers.__version__)
