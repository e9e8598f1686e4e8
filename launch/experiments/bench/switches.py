"""Speed of a recipe with each switch of the model and the optimizer, against without it:
`python -m launch.experiments.bench.switches`.

Steps of both sides alternate in one process, on the same random tokens: forward, losses, backward, clipping,
optimizer. A switch that changes the model's FLOPs is shown with their ratio, so that a reader can tell what
the switch computes from what it wastes.
"""

import gc
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from launch.experiments.bench.__main__ import alternate, machine
from train.layout.optim import build_optimizer, clip_gradients
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe import sizes
from train.recipe.reading import load_recipe
from train.recipe.schema import Precision, Recipe
from train.record.command import Figures, add_recipe_arguments, command
from train.record.tables import text_table
from train.step.microbatch import Batch, MicrobatchModel

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "sigmoid scores": ("model.moe.score=sigmoid",),
    "balance by bias": ("model.moe.score=sigmoid", "model.moe.balance=bias"),
    "balance by bias and loss": ("model.moe.score=sigmoid", "model.moe.balance=both"),
    "balance of each sequence": ("model.moe.balance_scope=sequence",),
    "groups of experts": ("model.moe.groups=4", "model.moe.top_groups=2"),
    "router noise": ("model.moe.jitter_eps=0.01",),
    "shared expert": ("model.moe.shared_hidden_size=224",),
    "shared expert with a gate": ("model.moe.shared_hidden_size=224", "model.moe.shared_gate=true"),
    "first layer dense": ("model.moe.dense_layers=1",),
    "experts in every 2nd layer": ("model.moe.every_n_layers=2",),
    "RMSNorm": ("model.norm=rmsnorm",),
    "query and key norm": ("model.qk_norm=true", "model.qk_norm_over=each_head"),
    "z-loss of logits": ("model.logit_z_loss_weight=0.0001",),
    "multi-token prediction": ("model.mtp=true",),
    "latent attention": (
        "model.clip_qkv=null",
        "model.n_kv_heads=4",
        "model.latent={kv_rank: 32, q_rank: null, nope_width: 32, rope_width: 16, v_width: 32}",
    ),
    "YaRN": ("model.yarn={factor: 4, original_tokens: 128}",),
    "bf16 moments": ("optimizer.moments=bf16",),
    "average of weights": ("optimizer.average_decay=0.999",),
    "Lion": ("optimizer.kind=lion",),
    "Muon": ("optimizer.kind=muon",),
    "QK-clip": ("model.clip_qkv=null", "optimizer.qk_clip=100"),
    "recomputed layers": ("training.recompute=layer",),
    "documents not masked": ("training.document_masking=false",),
}
"""Overrides of the recipe by what they switch on."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    add_recipe_arguments(parser, "yamls/smoke.yaml")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side (default 5)")
    parser.add_argument("--only", nargs="*", choices=list(SWITCHES), help="measure only these")


@command(
    "python -m launch.experiments.bench.switches",
    __doc__,
    add_arguments,
    json="write the figures",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Measures every switch and prints the table."""
    recipe = load_recipe(options.recipe, options.overrides)
    figures = {}
    for name in tqdm(options.only or SWITCHES, desc="switches"):
        switched = load_recipe(options.recipe, [*options.overrides, *SWITCHES[name]])
        without, with_it = alternate(name, [step_of(recipe), step_of(switched)], options.rounds, warmup=1)
        tokens = recipe.training.microbatch_sequences * recipe.data.sequence_tokens
        figures[name] = {
            "tokens_per_second": tokens / with_it,
            "tokens_per_second_without": tokens / without,
            "speed": without / with_it,
            "flops": _flops(switched) / _flops(recipe),
        }
        gc.collect()
    rows = [
        (
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_without']:,.0f}",
            f"{row['speed']:.2f}",
            f"{row['flops']:.2f}",
        )
        for name, row in figures.items()
    ]
    print(text_table(("switch", "tokens/s with it", "without", "speed", "FLOPs"), rows, "<>>>>"))
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    return Figures({"recipe": recipe.name, "switches": figures, "machine": machine()})


def step_of(recipe: Recipe) -> Callable[[], object]:
    """Builds a model and its optimizer, and returns an optimizer step of one microbatch."""
    training = recipe.training
    decoder = Decoder(
        recipe.model,
        device="meta",
        recompute=sizes.recomputed(training, sizes.layers(recipe.model)),
        loss_chunk_tokens=training.loss_chunk_tokens,
    )
    decoder.to_empty(device="cpu")
    initialize(decoder, recipe.model, recipe.seed)
    model = MicrobatchModel(decoder, recipe, Precision.fp32)
    optimizer = build_optimizer(model, recipe.optimizer, recipe.seed)
    batch = _tokens(recipe)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = model(batch)
        model.loss(outputs, batch)["total"].backward()
        with torch.no_grad():
            clip_gradients(model.parameters(), training.clip_norm)
        optimizer.step()

    return step


def _tokens(recipe: Recipe) -> Batch:
    """Returns a microbatch of random tokens, two documents to a sequence."""
    shape = (recipe.training.microbatch_sequences, recipe.data.sequence_tokens)
    ids_BS = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    documents_S = (torch.arange(shape[1]) >= shape[1] // 2).long()
    return {
        "input_ids": ids_BS,
        "document_ids": documents_S.expand(shape),
        "targets": ids_BS.roll(-1, dims=1),
        "sample_positions": torch.arange(shape[0]),
    }


def _flops(recipe: Recipe) -> float:
    return sizes.flops_per_token_training(recipe.model, recipe.data.sequence_tokens).total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
