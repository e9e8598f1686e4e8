"""Model and optimizer of a recipe on one device, built from the same parts as in a run. Needs no Composer."""

from torch.optim import Optimizer

from train.layout.optim import build_optimizer
from train.model.compiling import compile_decoder
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe import sizes
from train.recipe.schema import Precision, Recipe
from train.step.microbatch import MicrobatchModel


def build_on_one_device(
    recipe: Recipe, device: str, precision: Precision
) -> tuple[MicrobatchModel, Optimizer]:
    """Builds the model with its initial weights, and its optimizer.

    Args:
        recipe: the recipe; its layout is ignored.
        device: `cpu` or `cuda`.
        precision: precision of matrix products.
    """
    decoder = Decoder(
        recipe.model,
        device="meta",
        recompute=sizes.recomputed(recipe.training, sizes.layers(recipe.model)),
        loss_chunk_tokens=recipe.training.loss_chunk_tokens,
    )
    decoder.to_empty(device=device)
    initialize(decoder, recipe.model, recipe.seed)
    compile_decoder(decoder, recipe.training.compile, is_sharded=False)
    model = MicrobatchModel(decoder, recipe, precision)
    return model, build_optimizer(model, recipe.optimizer)
