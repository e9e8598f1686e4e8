"""Share of the exchange of tokens that halves hide: `python -m launch.experiments.bench.exchange --ranks 2`.

Ranks on this machine exchange over gloo, where that takes no time; so each exchange gets a delay by its
number of rows, as on a slow link, one exchange after another. Four kinds of pass take turns: whole or in
halves, with the delay or without. What it adds to the shortest pass of a kind is open, the rest hidden.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from train.recipe import sizes
from train.recipe.reading import load_recipe
from train.recipe.schema import Parallelism, Precision, Recipe
from train.recipe.topology import Topology
from train.record.command import Figures, add_recipe_arguments, command
from train.record.tables import text_table

TARGET_SHARE = 0.5
"""Least share of the delay that halves hide."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    add_recipe_arguments(parser, "yamls/smoke.yaml")
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes, all of them one expert group (default 2)"
    )
    parser.add_argument("--passes", type=int, default=8, help="passes of each kind (default 8)")
    parser.add_argument(
        "--share", type=float, default=0.25, help="delays of a pass over its time without (default 0.25)"
    )


@command(
    "python -m launch.experiments.bench.exchange",
    __doc__,
    add_arguments,
    json="write the figures",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Measures the passes; status 1 if halves hide less than the target."""
    recipe = load_recipe(options.recipe, options.overrides)
    print(f"{recipe.name}: importing torch and MegaBlocks", flush=True)
    from launch.verify.forked_ranks import run_ranks

    delay, whole, halves = run_ranks(
        options.ranks,
        lambda rank: measure(recipe, rank, options.passes, options.share),
        timeout_seconds=3600.0,
    )[0]
    rows = []
    for name, (plain, delayed) in (("whole", whole), ("in halves", halves)):
        hidden = 1 - (delayed - plain) / delay
        rows.append((name, f"{plain:.3f} s", f"{delayed:.3f} s", f"{hidden:.0%}"))
    print(text_table(("microbatch", "a pass", f"delayed by {delay:.3f} s", "hidden"), rows, ">>>"))
    share = 1 - (halves[1] - halves[0]) / delay
    print(f"target: halves hide at least {TARGET_SHARE:.0%}")
    figures = {"delay_seconds": delay, "whole": whole, "halves": halves, "hidden_share": share}
    return Figures({"recipe": recipe.name, "ranks": options.ranks, **figures}, int(share < TARGET_SHARE))


class SlowLink:
    """Delays exchanges by their rows, one after another, without keeping the host from computing."""

    def __init__(self, seconds_per_row: float) -> None:
        self.seconds_per_row = seconds_per_row
        self.is_slow = False
        self.rows = 0
        self._free_at = 0.0

    def __call__(self, exchange: Callable[..., Any], output: Any, sent: Any, **keywords: Any) -> Any:
        """Issues an exchange as torch does."""
        work = exchange(output, sent, **keywords)
        if sent.is_floating_point():
            self.rows += len(sent)
            if self.is_slow:
                self._free_at = max(self._free_at, time.perf_counter()) + self.seconds_per_row * len(sent)
                return _Late(work, self._free_at)
        return work


class _Late:
    """A handle whose collective is complete at a given time, or later."""

    def __init__(self, work: Any, at: float) -> None:
        self.work, self.at = work, at

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.at - time.perf_counter()))


Pair = tuple[float, float]
"""Seconds of a pass without and with the delay."""


def measure(recipe: Recipe, rank: Topology, passes: int, share: float) -> tuple[float, Pair, Pair]:
    """Returns the delays of a pass in seconds, and the shortest passes whole and in halves."""
    import functools

    import torch
    import torch.distributed as dist

    from train.layout.mesh import build_mesh, build_sharded
    from train.model.decoder import Decoder

    decoder = Decoder(
        recipe.model,
        device="meta",
        recompute=sizes.recomputed(recipe.training, sizes.layers(recipe.model)),
        loss_chunk_tokens=recipe.training.loss_chunk_tokens,
    )
    layout = Parallelism(expert=rank.world_size, interleave=True)
    build_sharded(decoder, build_mesh(layout, rank.world_size, "cpu"), Precision.fp32, recipe.seed)
    link = SlowLink(0.0)
    dist.all_to_all_single = functools.partial(link, dist.all_to_all_single)  # this process ends with it
    generator = torch.Generator().manual_seed(rank.rank)
    sequences = max(2, recipe.training.microbatch_sequences // 2 * 2)
    ids_BS = torch.randint(
        recipe.model.vocab_size, (sequences, recipe.data.sequence_tokens), generator=generator
    )

    def one(interleave: bool, is_slow: bool) -> float:
        decoder.transformer.interleave, link.is_slow, link.rows = interleave, is_slow, 0
        dist.barrier()
        begun = time.perf_counter()
        (decoder(ids_BS, None, ids_BS).loss_sum / ids_BS.numel()).backward()
        decoder.zero_grad()
        dist.barrier()
        return time.perf_counter() - begun

    for interleave in (True, False):
        one(interleave, False)
    plain = torch.tensor(min(one(False, False) for _ in range(3)))
    dist.broadcast(plain, 0)
    delay = share * plain.item()
    link.seconds_per_row = delay / link.rows
    kinds = [(interleave, is_slow) for interleave in (False, True) for is_slow in (False, True)]
    found: dict[tuple[bool, bool], list[float]] = {kind: [] for kind in kinds}
    for _ in range(passes):
        for kind in kinds:
            found[kind].append(one(*kind))
    whole, whole_slow, halves, halves_slow = (min(found[kind]) for kind in kinds)
    return delay, (whole, whole_slow), (halves, halves_slow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
