"""Observers of a step that a recipe asks for: norms by layer, and a profile."""

from pathlib import Path

from composer.core import Callback

from train.model.decoder import Decoder
from train.recipe.schema import Compile, Recipe
from train.recipe.topology import Topology
from train.record.profiling import Profiling
from train.step.layer_norms import LayerNorms


def observers(
    recipe: Recipe, folder: Path, topology: Topology, device_type: str, decoder: Decoder
) -> list[Callback]:
    """Returns what measures norms by layer and records a profile, where the recipe asks for them."""
    training, found = recipe.training, list[Callback]()
    if interval := recipe.tracking.layer_norms_interval_batches:
        sees_layers = training.compile is not Compile.model
        found.append(LayerNorms(decoder, interval, sees_layers=sees_layers))
    if training.profile_batches and topology.rank in training.profile_ranks:
        first, last = training.profile_batches
        found.append(Profiling(folder, topology.rank, first, last, on_gpu=device_type == "cuda"))
    return found
