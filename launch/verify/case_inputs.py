"""Batches of the gate's cases, and initial weights that route their tokens as an input says.

Shapes: B global batch in sequences, S sequence, D width, E experts.
"""

import torch
from torch import Tensor, nn

from launch.verify.cases import SEQUENCES, STEPS, GateInput
from train.model.init import own_part
from train.model.loss import IGNORE
from train.recipe.curriculum import plan_stages
from train.recipe.schema import Recipe
from train.step.microbatch import Batch

COMMON_PART = 0.1
"""Common component of all embeddings in weights that steer the router; embeddings have a std of 0.02."""


def make_batches(recipe: Recipe, each: GateInput, seed: int) -> list[Batch]:
    """Makes a global batch for every step: input_ids, document_ids and targets [B, S], sample_positions [B].

    S is the sequence length of the step's phase. A document has from one token to a whole sequence; its last
    token has no target.
    """
    curriculum = plan_stages(recipe)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(STEPS):
        S = curriculum.stage_of(step).sequence_samples * curriculum.sample_tokens
        ids_BS = torch.randint(recipe.model.vocab_size, (SEQUENCES, S), generator=generator)
        begins_BS = torch.rand((SEQUENCES, S), generator=generator) < 4 / S
        begins_BS[0] = False
        begins_BS[1, :3] = True
        documents_BS = begins_BS.cumsum(dim=1)
        targets_BS = ids_BS.roll(-1, dims=1)
        targets_BS[:, -1] = IGNORE
        targets_BS[:, :-1][documents_BS[:, :-1] != documents_BS[:, 1:]] = IGNORE
        batch = {"input_ids": ids_BS, "targets": targets_BS}
        if each.masked:
            batch["continues"] = targets_BS != IGNORE
            targets_BS.masked_fill_(~_responses(targets_BS, generator), IGNORE)
        if each.idle or each.masked:
            targets_BS[-2:] = IGNORE
        if recipe.training.document_masking:
            batch["document_ids"] = documents_BS
        batch["sample_positions"] = torch.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
        batches.append(batch)
    return batches


def _responses(targets_BS: Tensor, generator: torch.Generator) -> Tensor:
    """Returns which targets have a loss: runs of eight on average, from all of the first sequence to few."""
    B, S = targets_BS.shape
    begins_BS = torch.rand((B, S), generator=generator) < 1 / 8
    share_B1 = torch.linspace(1, 0, B)[:, None]
    is_response_BS = torch.rand((B, S), generator=generator) < share_B1
    return is_response_BS.gather(1, begins_BS.cumsum(dim=1).clamp(max=S - 1))


def idle_experts(recipe: Recipe) -> int:
    """Number of experts, the last ones, that get no token from the input `idle`."""
    moe = recipe.model.moe
    return 0 if moe is None else min(moe.experts // 2, moe.experts - moe.top_k)


@torch.no_grad()
def steer_router(decoder: nn.Module, recipe: Recipe, each: GateInput) -> None:
    """Changes initial weights, however they are sharded, so that tokens are routed as the input says.

    Every embedding gets a common component, which survives normalisation; a router row along it raises or
    lowers its expert's score equally for every token.
    """
    moe = recipe.model.moe
    if moe is None or not (each.idle or each.crowded):
        return
    D, E = recipe.model.d_model, moe.experts
    direction_D = torch.ones(D)
    direction_D[1::2] = -1.0
    scores_E = torch.zeros(E)
    if each.idle:
        scores_E[E - idle_experts(recipe) :] = -4.0
    if each.crowded:
        scores_E[1] = 4.0
    for name, parameter in decoder.named_parameters():
        local, first_row, _ = own_part(parameter)
        if name.endswith("wte.weight"):
            local += COMMON_PART * direction_D
        elif name.endswith("router.layer.weight"):
            local += scores_E[first_row : first_row + local.shape[0], None] * direction_D / D
