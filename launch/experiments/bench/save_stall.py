"""Training time that a checkpoint costs: `python -m launch.experiments.bench.save_stall RECIPE.yaml`.

Saves the recipe's full-size model and optimizer while steps continue, and prints how long each save stalls
training. Without Composer: ranks are forked, sharded as the recipe says, and fed random tokens.
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Parallelism, Precision, Recipe
from train.recipe.topology import Topology
from train.record.command import Figures, add_recipe_arguments, command
from train.record.tables import text_table

TARGET_SHARE = 0.2
"""Largest share of a save's time that may stall training."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    add_recipe_arguments(parser, example="yamls/smoke.yaml")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints to measure (default 5)")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: a temporary folder")


@command(
    "python -m launch.experiments.bench.save_stall",
    __doc__,
    add_arguments,
    json="write the figures",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Measures the saves; status 1 if the share is above the target."""
    recipe = load_recipe(options.recipe, options.overrides)
    recipe = replace(recipe, parallelism=Parallelism(expert=recipe.parallelism.expert))
    validate(recipe, Topology(0, options.ranks, 0, options.ranks), options.recipe)
    print(f"{recipe.name}: importing torch and MegaBlocks", flush=True)
    from launch.verify.forked_ranks import run_ranks

    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
        measured = run_ranks(
            options.ranks,
            lambda topology: measure(recipe, topology, Path(folder), options.saves),
            timeout_seconds=3600.0,
        )[0]
    copy, whole = (statistics.median(figures) for figures in zip(*measured, strict=True))
    share = copy / whole
    saves = [*enumerate(measured, start=1), ("median", (copy, whole))]
    rows = [
        (name, f"{stall:.3f} s", f"{seconds:.3f} s", f"{stall / seconds:.1%}")
        for name, (stall, seconds) in saves
    ]
    print(text_table(("save", "stall", "whole save", "share"), rows, ">>>>"))
    print(f"target: a share of at most {TARGET_SHARE:.0%}")
    figures = {"copy_seconds": copy, "save_seconds": whole, "share": share, "saves": measured}
    return Figures({"recipe": recipe.name, **figures}, 1 if share > TARGET_SHARE else 0)


def measure(recipe: Recipe, topology: Topology, folder: Path, saves: int) -> list[tuple[float, float]]:
    """Measures the copy and total seconds of each save while steps run; the first save is not counted.

    The first save allocates the host buffer, once per run.
    """
    import torch

    from train.checkpoint.files import Progress
    from train.checkpoint.saver import CheckpointSaver
    from train.layout.mesh import build_mesh, build_sharded
    from train.layout.optim import average_replicated_gradients, build_optimizer, clip_gradients
    from train.model.decoder import Decoder
    from train.model.init import initialize

    decoder = Decoder(recipe.model, device="meta", loss_chunk_tokens=recipe.training.loss_chunk_tokens)
    if topology.world_size > 1:
        mesh = build_mesh(recipe.parallelism, topology.world_size, "cpu")
        build_sharded(decoder, mesh, Precision.fp32, recipe.seed)
    else:
        decoder.to_empty(device="cpu")
        initialize(decoder, recipe.model, recipe.seed)
    optimizer = build_optimizer(decoder, recipe.optimizer)
    saver = CheckpointSaver(folder, topology, keep_last=1)
    ids_BS = torch.randint(recipe.model.vocab_size, (1, min(256, recipe.data.sequence_tokens)))

    def step() -> None:
        output = decoder(ids_BS, None, ids_BS)
        (output.loss_sum / ids_BS.numel()).backward()
        average_replicated_gradients(decoder.parameters())
        clip_gradients(decoder.parameters(), recipe.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    figures = []
    for number in range(saves + 1):
        step()
        saver.start(decoder, optimizer, Progress(number + 1, 0, 0, time.monotonic()))
        step()
        saved = saver.wait()
        assert saved is not None and not saved.error, saved
        if number:
            figures.append((saved.copy_seconds, saved.seconds))
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
