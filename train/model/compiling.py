"""torch.compile, layer by layer or for the whole decoder: `training.compile`.

The forward methods are compiled rather than the modules, so that FSDP2's hooks, which gather weights, stay
outside. Where a rank holds the whole model nothing breaks the graph. Where it is sharded, the hooks of the
experts, a unit inside a layer, do; and where experts exchange tokens, MegaBlocks' exchange runs as it
is, since it waits for the numbers of tokens. Evaluation and generation, with their many shapes, are not
compiled.
"""

import functools
from typing import Any

import torch
from torch import nn

from train.model.attention import DocumentKernel
from train.model.decoder import Decoder
from train.model.moe import MoE
from train.recipe.schema import Compile


def compile_decoder(decoder: Decoder, how: Compile, *, is_sharded: bool) -> None:
    """Compiles a decoder in place; names, parameters and hooks stay as they are.

    Args:
        decoder: on its device, sharded already where it is.
        how: the recipe's `training.compile`.
        is_sharded: FSDP2's hooks may break the graph; else a break is an error.
    """
    if how is Compile.off:
        return
    if next(decoder.parameters()).is_cuda:
        # The other kernel takes documents' number and lengths, which differ between batches: a graph would
        # be compiled for each, and the host would wait inside it.
        decoder.transformer.document_kernel = DocumentKernel.flex
    parts = [decoder] if how is Compile.model else decoder.transformer.layers
    for part in parts:
        # Not nn.Module.compile: it would trace the hooks too.
        compiled = _compiled_in_training(part, fullgraph=not is_sharded)
        part.forward = compiled  # type: ignore[method-assign, unused-ignore]
    for module in decoder.modules():
        if isinstance(module, MoE) and module.experts.args.moe_expert_model_parallelism:
            module.experts.forward_fn = torch.compiler.disable(module.experts.forward_fn)


def _compiled_in_training(module: nn.Module, *, fullgraph: bool) -> Any:
    plain = module.forward
    compiled = torch.compile(plain, fullgraph=fullgraph)

    @functools.wraps(plain)
    def forward(*args: Any, **keywords: Any) -> Any:
        return (compiled if module.training else plain)(*args, **keywords)

    return forward
