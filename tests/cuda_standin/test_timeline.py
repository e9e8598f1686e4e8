"""Full-size layers replayed: how much of the traffic between GPUs nothing hides."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_standin import standin
from tests.cuda_standin.replay import read, replay
from train.recipe.reading import load_recipe

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[2] / "yamls"


class Layer(NamedTuple):
    """Milliseconds of a layer's forward and backward pass, in one microbatch."""

    total: float
    links: float
    open: float


def layer_of(stem: str, ranks: int, folder: Path, *overrides: str, **settings: str) -> Layer:
    """Replays a step of two and of four layers; half of the difference is a layer's."""
    file = YAMLS / f"{stem}.yaml"
    batch = ranks * load_recipe(file).training.microbatch_sequences
    keys = ["training.document_masking=false", f"training.global_batch_sequences={batch}", *overrides]
    found = []
    for layers in (2, 4):
        timeline, own = folder / f"{stem}-{layers}.tsv", [*keys, f"model.n_layers={layers}"]
        standin.run("world", str(ranks), str(file), *own, ALONE="1", TIMELINE=str(timeline), **settings)
        found.append(replay(read(str(timeline)), load_recipe(file, own).parallelism, ranks))
        timeline.unlink()
    two, four = ((each.seconds, each.links, each.open) for each in found)
    return Layer(*(500 * (b - a) for a, b in zip(two, four, strict=True)))
