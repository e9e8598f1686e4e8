"""Seeds of a tiny model trained together or apart: `python -m launch.experiments.bench.seeds`.

A batch of seeds is one decoder with the weights of all of them, stacked: a product takes each seed's own
tokens and weights, attention sees only more sequences, and experts are only more experts. It computes what
each seed computes by itself. Four ways to use a machine of two cores take turns: processes of one thread with
a seed each, or a batch each, and one process of two threads with a seed or a batch.
"""

import multiprocessing
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.batch import Batch
from data.loader import build_train_loader
from data.opened import OpenedData
from data.write_shards import ensure_shards
from train.layout.optim import build_optimizer, clip_gradients
from train.model.attention import Attention
from train.model.decoder import Block, Decoder, LanguageModelHead
from train.model.init import initialize
from train.model.loss import chunked_cross_entropy
from train.model.megablocks_ops import histogram
from train.model.moe import MoE, MoEAux, balance_loss
from train.model.norms import LayerNorm, layer_norm
from train.model.router import Router, Routing
from train.recipe.reading import load_recipe
from train.recipe.schema import Precision, Recipe
from train.record.command import Figures, add_recipe_arguments, command
from train.record.tables import text_table
from train.step.microbatch import MicrobatchModel

# N seeds, B sequences of each, S tokens, T tokens of all seeds, D model, E experts of a seed, K of a token.

WAYS = {
    "2 processes, 1 seed each": (2, 1, 1),
    "2 processes, batches of seeds": (2, 1, None),
    "1 process of 2 threads, 1 seed": (1, 2, 1),
    "1 process of 2 threads, batch of seeds": (1, 2, None),
}
"""Processes, threads and seeds of each; None: as many as `--seeds`."""
STEPS = 2
"""Of a turn."""


class SeedsLinear(nn.Module):
    """A linear layer with a weight of each seed."""

    sharing = None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.get_parameter("weight").detach() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """Returns each seed's product, of the shape of the input."""
        seeds, out, width = self.weight.shape
        return torch.bmm(x.view(seeds, -1, width), self.weight.mT).view(*x.shape[:-1], out)


class SeedsNorm(nn.Module):
    """A norm with a weight of each seed."""

    def __init__(self, norms: Sequence[LayerNorm]) -> None:
        super().__init__()
        self.eps = norms[0].eps
        self.weight = nn.Parameter(torch.stack([norm.weight.detach() for norm in norms]))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the tokens of each seed."""
        parts = zip(x.chunk(len(self.weight)), self.weight, strict=True)
        return torch.cat([layer_norm(part, weight_D, self.eps) for part, weight_D in parts])


class SeedsEmbedding(nn.Module):
    """An embedding of each seed, one after another."""

    def __init__(self, embeddings: Sequence[nn.Module]) -> None:
        super().__init__()
        weights = [embedding.get_parameter("weight").detach() for embedding in embeddings]
        self.seeds, self.rows = len(weights), len(weights[0])
        self.weight = nn.Parameter(torch.cat(weights))

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Returns the rows of each seed's own ids."""
        first_N1 = torch.arange(self.seeds)[:, None] * self.rows
        return functional.embedding((ids_BS.view(self.seeds, -1) + first_N1).view_as(ids_BS), self.weight)


class SeedsHead(LanguageModelHead):
    """An output projection of each seed; the loss is a sum of each."""

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.stack([head.weight.detach() for head in heads]))

    def forward(  # type: ignore[override]
        self, hidden_TD: Tensor, targets_T: Tensor, chunk_tokens: int | None = None, z_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Returns the summed loss of each seed, [N], and each token's."""
        seeds = len(self.weight)
        parts = zip(hidden_TD.chunk(seeds), self.weight, targets_T.chunk(seeds), strict=True)
        sums, losses = zip(
            *(chunked_cross_entropy(*part, chunk_tokens, z_weight) for part in parts), strict=True
        )
        return torch.stack(sums), torch.cat(losses)


class SeedsRouter(Router):
    """A router of each seed, whose experts are numbered one seed after another."""

    def __init__(self, routers: Sequence[Router]) -> None:
        nn.Module.__init__(self)
        self.moe, self.expert_bias, self.jitter = routers[0].moe, None, None
        self.layer = SeedsLinear([router.layer for router in routers])  # type: ignore[assignment]
        self.seeds = len(routers)

    def forward(self, x_TD: Tensor, rows: slice = slice(None)) -> Routing:
        """Routes the tokens of each seed to its own experts."""
        moe = self.moe
        logits_TE = self.layer(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, experts_TK = scores_TE.topk(moe.top_k, dim=-1)
        if moe.normalize_weights_p is not None:
            norm = torch.linalg.vector_norm(weights_TK, ord=moe.normalize_weights_p, dim=-1, keepdim=True)
            weights_TK = weights_TK / norm
        first_T1 = torch.arange(self.seeds).repeat_interleave(len(x_TD) // self.seeds)[:, None] * moe.experts
        return Routing(logits_TE, scores_TE, weights_TK, experts_TK + first_T1)


class SeedsMoE(MoE):
    """The experts of all seeds in one layer."""

    def _aux(self, routing: Routing, batch: int, rows: slice = slice(None)) -> MoEAux:
        assert isinstance(self.router, SeedsRouter)
        seeds, experts = self.router.seeds, self.router.moe.experts
        mean_NE = routing.scores_TE.view(seeds, -1, experts).mean(dim=1)
        # The decoder would take the mean over seeds.
        self.z_N = torch.logsumexp(routing.logits_TE, dim=-1).square().view(seeds, -1).mean(dim=1)
        tokens_E = histogram(routing.experts_TK.flatten(), seeds * experts).long()
        return MoEAux(mean_NE.flatten(), self.z_N.mean(), tokens_E, None)


class SeedsOfModel(nn.Module):
    """A batch of seeds: models of one recipe, mixtures balanced by a loss, as one.

    Args:
        recipe: the recipe.
        models: one of each seed, whose weights are copied.
    """

    def __init__(self, recipe: Recipe, models: Sequence[MicrobatchModel]) -> None:
        super().__init__()
        self.recipe, self.seeds = recipe, len(models)
        model, decoders = recipe.model, [each.decoder for each in models]
        self.decoder = Decoder(model, device="meta", loss_chunk_tokens=recipe.training.loss_chunk_tokens)
        own = self.decoder.transformer
        every = [decoder.transformer for decoder in decoders]
        own.wte = SeedsEmbedding([each.wte for each in every])
        own.norm_f = SeedsNorm([each.norm_f for each in every])  # type: ignore[misc]
        for layer, block in enumerate(own.blocks):
            assert isinstance(block, Block)
            self._fill(block, [each.blocks[layer] for each in every])
        self.decoder.lm_head = SeedsHead([decoder.lm_head for decoder in decoders if decoder.lm_head])

    def _fill(self, block: Block, blocks: Sequence[Any]) -> None:
        half, halves = block.norm_attn_norm, [each.norm_attn_norm for each in blocks]
        half.norm_1 = SeedsNorm([each.norm_1 for each in halves])
        half.norm_2 = SeedsNorm([each.norm_2 for each in halves])
        assert isinstance(half.attn, Attention)
        half.attn.Wqkv = SeedsLinear([each.attn.Wqkv for each in halves])  # type: ignore[assignment]
        half.attn.out_proj = SeedsLinear([each.attn.out_proj for each in halves])  # type: ignore[assignment]
        model = self.recipe.model
        assert model.moe is not None
        all_experts = SeedsMoE(
            model.d_model,
            model.ffn_hidden_size,
            replace(model.moe, experts=self.seeds * model.moe.experts),
            "cpu",
        )
        all_experts.router = SeedsRouter([each.ffn.router for each in blocks])
        with torch.no_grad():
            for name, weight in all_experts.experts.mlp.named_parameters():
                weight.copy_(torch.cat([each.ffn.experts.mlp.get_parameter(name) for each in blocks]))
        block.ffn = all_experts

    def losses(self, batch: Batch) -> Tensor:
        """Returns the loss of each seed, [N]; the batch has their sequences, one seed after another."""
        moe, seeds = self.recipe.model.moe, self.seeds
        assert moe is not None
        documents = batch["document_ids"] if self.recipe.training.document_masking else None
        out = self.decoder(batch["input_ids"], documents, batch["targets"])
        sequences, length = batch["targets"].shape
        scores_LNE = out.mean_scores_LE.unflatten(1, (seeds, -1))
        tokens_LNE = out.expert_tokens_LE.unflatten(1, (seeds, -1))
        balance = torch.stack([balance_loss(scores_LNE[:, n], tokens_LNE[:, n]) for n in range(seeds)])
        language_N: Tensor = out.loss_sum / (sequences // seeds * (length - 1))
        z_N = torch.stack([layer.z_N for layer in self.modules() if isinstance(layer, SeedsMoE)]).mean(dim=0)
        return language_N + moe.balance_loss_weight * balance + moe.z_loss_weight * z_N


class Alone:
    """Trains one seed as a run does, without a Trainer."""

    def __init__(self, recipe: Recipe, seeds: Sequence[int]) -> None:
        (seed,) = seeds
        self.recipe, self.model = recipe, _model(recipe, seed)
        self.optimizer = build_optimizer(self.model, recipe.optimizer, seed)

    def step(self, batch: Batch) -> list[float]:
        """Trains a step; returns the seed's loss."""
        loss = self.model.loss(self.model(batch), batch)["total"]
        loss.backward()
        clip_gradients(self.model.parameters(), self.recipe.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [float(loss.detach())]


class Together:
    """Trains a batch of seeds."""

    def __init__(self, recipe: Recipe, seeds: Sequence[int]) -> None:
        self.recipe, self.model = recipe, SeedsOfModel(recipe, [_model(recipe, seed) for seed in seeds])
        plain = [module.weight for module in self.model.modules() if isinstance(module, SeedsNorm)]
        rest = [p for p in self.model.parameters() if not any(p is norm for norm in plain)]
        how = recipe.optimizer
        groups = [{"params": rest, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        betas = (how.betas[0], how.betas[1])
        self.optimizer = torch.optim.AdamW(groups, lr=how.learning_rate, betas=betas, eps=how.eps, fused=True)

    def step(self, batch: Batch) -> list[float]:
        """Trains a step; returns each seed's loss."""
        losses_N = self.model.losses(batch)
        losses_N.sum().backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses_N.tolist()

    @torch.no_grad()
    def _clip(self) -> None:
        most = self.recipe.training.clip_norm
        grads = [p.grad.view(self.model.seeds, -1) for p in self.model.parameters() if p.grad is not None]
        norm_N = torch.stack([grad.norm(dim=1).double() for grad in grads]).square().sum(dim=0).sqrt()
        if most is not None:
            scale_N1 = (most / (norm_N + 1e-6)).clamp(max=1.0).float()[:, None]
            for grad in grads:
                grad.mul_(scale_N1)


def _model(recipe: Recipe, seed: int) -> MicrobatchModel:
    decoder = Decoder(recipe.model, device="cpu", loss_chunk_tokens=recipe.training.loss_chunk_tokens)
    initialize(decoder, recipe.model, seed)
    return MicrobatchModel(decoder, recipe, Precision.fp32)


def batches(recipe: Recipe, seeds: Sequence[int]) -> Iterator[Batch]:
    """Yields the batches of seeds, each in its own order, one after another in one batch."""
    loaders = [
        iter(build_train_loader(OpenedData(replace(recipe, seed=seed)), rank=0, world_size=1))
        for seed in seeds
    ]
    while True:
        parts = [next(loader) for loader in loaders]
        yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _work(recipe: Recipe, seeds: Sequence[int], threads: int, pipe: Connection) -> None:
    """Trains a turn whenever the pipe says so, until it says otherwise."""
    torch.set_num_threads(threads)
    trains = (Alone if len(seeds) == 1 else Together)(recipe, seeds)
    source = batches(recipe, seeds)
    trains.step(next(source))
    pipe.send(0.0)
    while pipe.recv():
        begun = time.process_time()
        for _ in range(STEPS):
            trains.step(next(source))
        pipe.send(time.process_time() - begun)


def measure(recipe: Recipe, seeds: int, turns: int) -> dict[str, list[tuple[float, float]]]:
    """Returns the seconds of a step of a seed by way and turn: of the machine, and of its processors.

    On a machine that does other things only the processors' mean something, and those of threads that wait
    for each other nothing.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {}
    workers = []
    for way, (processes, threads, at_once) in WAYS.items():
        for n in range(processes):
            ours, theirs = context.Pipe()
            count = at_once or seeds
            own = list(range(1 + n * count, 1 + (n + 1) * count))
            workers.append(context.Process(target=_work, args=(recipe, own, threads, theirs), daemon=True))
            workers[-1].start()
            ours.recv()
            pipes.setdefault(way, []).append(ours)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for turn in range(turns):
        ways = list(WAYS) if turn % 2 == 0 else list(reversed(WAYS))
        for way in ways:
            begun = time.perf_counter()
            for pipe in pipes[way]:
                pipe.send(True)
            used = sum(pipe.recv() for pipe in pipes[way])
            trained = STEPS * len(pipes[way]) * (WAYS[way][2] or seeds)
            found[way].append(((time.perf_counter() - begun) / trained, used / trained))
    for pipe in (pipe for of_way in pipes.values() for pipe in of_way):
        pipe.send(False)
    for worker in workers:
        worker.join(30)
    return found


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    add_recipe_arguments(parser, "yamls/ladder/fine-efficiency-s.yaml")
    parser.add_argument("--seeds", type=int, default=4, help="of a batch (default 4)")
    parser.add_argument("--turns", type=int, default=9, help="of each way (default 9)")


@command(
    "python -m launch.experiments.bench.seeds",
    __doc__,
    add_arguments,
    json="write the figures",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Measures the ways in turns; each is compared with the first in its own turn."""
    recipe = load_recipe(options.recipe, options.overrides)
    ensure_shards(OpenedData(recipe))
    found = measure(recipe, options.seeds, options.turns)
    first = next(iter(found.values()))
    rows = []
    for way, turns in found.items():
        row = [way]
        for side in (0, 1):
            ratios = sorted(own[side] / base[side] for own, base in zip(turns, first, strict=True))
            spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}"
            seconds = median(turn[side] for turn in turns)
            row += [f"{seconds * 1000:.0f} ms", f"{median(ratios):.2f}", spread]
        rows.append(tuple(row))
    heads = ("way", "step of a seed", "ratio", "middle half", "CPU time", "ratio", "middle half")
    print(text_table(heads, rows, "<>>>>>>"))
    return Figures({"recipe": recipe.name, "seeds": options.seeds, "seconds": found})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
