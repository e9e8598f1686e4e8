"""A dense model as a mixture of experts with the same loss: `python -m train.hf.upcycle SOURCE OUT`.

Each expert is the dense feed-forward, copied (Komatsuzaki et al. 2023), or with `--granularity G` one of G
slices of its hidden units (He et al. 2024, "virtual groups"): the G slices of a copy share a router row,
so that the top k = G x m choices are always m whole copies. Weights of the chosen add up to 1, and the
slices' outputs are scaled by G; so the mixture's output is the dense one's, whatever the router says.
Training then tells the experts apart.

Shapes: D d_model, F dense hidden size, E experts, G granularity, N = E / G copies.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.recipe.errors import UserError
from train.recipe.schema import Balance, Ffn, Model, Moe

if TYPE_CHECKING:
    from train.hf.weights_folder import Written

USAGE_STATUS = 2


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (2: a mistake of the user)."""
    options = parse(arguments)
    print(f"upcycle: opening {options.source}; importing torch first", file=sys.stderr, flush=True)
    from train.recipe.errors import UserError

    try:
        written = upcycle(
            options.source,
            options.out,
            Moe(experts=options.experts, top_k=options.top_k, balance=Balance(options.balance)),
            options.granularity,
            options.seed,
        )
    except UserError as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return USAGE_STATUS
    print(
        f"{options.out}: {written.parameters:,} parameters, {written.bytes / 1e9:.3f} GB; a recipe that says "
        f"`extends: {options.out}/model.yaml` has its architecture, start.weights={options.out} its weights"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(written), indent=1) + "\n")
    return 0


def upcycle(source: Path, out: Path, moe: Moe, granularity: int = 1, seed: int = 17) -> "Written":
    """Streams the mixture's weights into a folder that recipes can start from.

    Args:
        source: a dense model: a run, a checkpoint, an imported folder or Hugging Face's form.
        out: new, empty, or left unfinished by the same call.
        moe: experts and top-k; weights are normalised to add up to 1 in any case.
        granularity: G, slices that the dense feed-forward is cut into.
        seed: of the router's initial rows.

    Raises:
        UserError: if the numbers do not go together, or the source is no dense GLU model.
    """
    from train.hf.upcycled_weights import UpcycledWeights
    from train.hf.weights import open_weights
    from train.hf.weights_folder import write_weights_folder

    opened = open_weights(source)
    model = mixture_of(opened.model, replace(moe, normalize_weights_p=1), granularity)
    weights = UpcycledWeights(opened.weights, opened.model, model, granularity, seed)
    origin = {"upcycled_from": str(opened.path), "granularity": granularity, "seed": seed}
    return write_weights_folder(out, model, weights, origin | {"moe": asdict(moe)})


def mixture_of(dense: Model, moe: Moe, granularity: int) -> Model:
    """The mixture's architecture.

    Raises:
        UserError: if the numbers do not go together.
    """
    if dense.moe is not None or dense.ffn is not Ffn.glu:
        raise UserError("the source is a mixture of experts already, or its feed-forward is no GLU")
    for name, number in (
        ("experts", moe.experts),
        ("top-k", moe.top_k),
        ("hidden size", dense.ffn_hidden_size),
    ):
        if number % granularity:
            raise UserError(f"{name} {number} is not divisible by granularity {granularity}")
    if moe.top_k > moe.experts:
        raise UserError(f"top-k {moe.top_k} exceeds {moe.experts} experts")
    return replace(dense, moe=moe, ffn_hidden_size=dense.ffn_hidden_size // granularity)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.hf.upcycle",
        description="Turns a dense model into a mixture of experts with the same loss at step 0.",
    )
    parser.add_argument(
        "source", type=Path, help="dense: runs/NAME, a checkpoint, imported or Hugging Face folder"
    )
    parser.add_argument("out", type=Path, help="folder to write; the same call goes on with it")
    parser.add_argument("--experts", type=int, default=16, help="experts E per layer (default: 16)")
    parser.add_argument("--top-k", type=int, default=4, help="experts per token (default: 4)")
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="slices per copy of the dense layer; top-k = G keeps its FLOPs (default: 1, copies)",
    )
    parser.add_argument("--balance", choices=[b.value for b in Balance], default="loss", help="default: loss")
    parser.add_argument("--seed", type=int, default=17, help="of the router (default: 17)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args(arguments)
    if min(options.experts, options.top_k, options.granularity) < 1:
        parser.error("--experts, --top-k and --granularity must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
