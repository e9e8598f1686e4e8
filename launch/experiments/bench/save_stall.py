"""How long a checkpoint stops training: `python -m launch.experiments.bench.save_stall RECIPE.yaml`.

Saves the recipe's model (in its own size) and optimizer while steps go on, and prints what each save took of
training. Without Composer: ranks are forked, sharded as the recipe says, and fed random tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Parallelism, Precision, Recipe
from train.recipe.topology import Topology

TARGET_SHARE = 0.2
"""At most this share of a save's time may be taken from training."""


def main(arguments: list[str]) -> int:
    """Runs the command line; exit status 1 if the share is above the target."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.experiments.bench.save_stall", description=__doc__
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints that count (default 5)")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: a temporary folder")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        recipe = replace(recipe, parallelism=Parallelism(expert=recipe.parallelism.expert))
        validate(recipe, Topology(0, options.ranks, 0, options.ranks), options.recipe)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return 2
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
    print(f"{'save':>6}{'stands still':>15}{'whole save':>13}{'share':>8}")
    for number, (still, seconds) in enumerate(measured, start=1):
        print(f"{number:6d}{still:13.3f} s{seconds:11.3f} s{still / seconds:8.1%}")
    print(f"median{copy:13.3f} s{whole:11.3f} s{share:8.1%}   target at most {TARGET_SHARE:.0%}")
    if options.json:
        figures = {"copy_seconds": copy, "save_seconds": whole, "share": share, "saves": measured}
        Path(options.json).write_text(json.dumps({"recipe": recipe.name, **figures}, indent=1))
    return 1 if share > TARGET_SHARE else 0


def measure(recipe: Recipe, topology: Topology, folder: Path, saves: int) -> list[tuple[float, float]]:
    """Copy and whole time of each save in seconds, steps running meanwhile; the first save is not counted.

    The first one allocates the host copy, once for a run.
    """
    import torch

    from train.checkpoint.files import Progress
    from train.checkpoint.saver import CheckpointSaver
    from train.layout.mesh import build_mesh, build_sharded
    from train.layout.optim import build_optimizer, clip_gradients
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
