"""Full-size layers replayed: how much of the traffic between GPUs nothing hides."""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.fsdp import FSDPModule

from launch.plan.hardware import GPUS
from launch.plan.step import make_plan
from launch.plan.step_time import Efficiency
from tests.cuda_standin import standin
from tests.cuda_standin.replay import ATTENTION, MEMORY, PRODUCTS, read, replay
from train.recipe.reading import load_recipe

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).resolve().parents[2] / "yamls"


class LayerTimes(NamedTuple):
    """Milliseconds of a layer's forward and backward pass, in one microbatch."""

    total: float
    links: float
    open: float
    rest: float
    """Of the same step, what is in no layer: embeddings, loss, sums over ranks, optimizer."""


@functools.cache
def layer_of(
    stem: str, ranks: int, *overrides: str, is_ahead: bool = True, gathers_all: bool = False
) -> LayerTimes:
    """Replays a step of two and of four layers; half of the difference is a layer's.

    Args:
        stem: name of the recipe's file.
        ranks: GPUs.
        overrides: of the recipe.
        is_ahead: gather and reduce in our order, not in FSDP2's own.
        gathers_all: the weights of all layers stay gathered between the passes.
    """
    settings = {} if is_ahead else {"NOT_AHEAD": "1"}
    file = YAMLS / f"{stem}.yaml"
    batch = ranks * load_recipe(file).training.microbatch_sequences
    keys = ["training.document_masking=false", f"training.global_batch_sequences={batch}", *overrides]
    found = []
    for layers in (2, 4):
        own = [*keys, f"model.n_layers={layers}"]
        own += [f"parallelism.gathered_layers={layers}"] if gathers_all else []
        with tempfile.NamedTemporaryFile() as timeline:
            settings["TIMELINE"] = timeline.name
            standin.run("world", str(ranks), str(file), *own, ALONE="1", **settings)
            found.append(replay(read(timeline.name), load_recipe(file, own).parallelism, ranks))
    two, four = ((each.seconds, each.links, each.open) for each in found)
    layer = [500 * (b - a) for a, b in zip(two, four, strict=True)]
    return LayerTimes(*layer, rest=1000 * two[0] - 2 * layer[0])


@pytest.mark.parametrize(("stem", "ranks", "expert"), [("dbrx-moe-a", 64, 1), ("dbrx", 3072, 8)])
def test_arithmetic_hides_nine_tenths_of_a_layer_s_traffic_or_more(
    stem: str, ranks: int, expert: int
) -> None:
    """Of MoE-A all; of DBRX only the exchange of tokens stays open, a twentieth of the layer."""
    if not hasattr(FSDPModule, "set_reduce_scatter_max_input_buffers"):
        pytest.skip("before torch 2.15 the experts' reduce-scatter ends before the next may begin")
    layer = layer_of(stem, ranks, f"parallelism.expert={expert}")
    assert layer.links > 0.25 * layer.total
    assert layer.open < 0.1 * min(layer.total, layer.links)


REPLAYED = Efficiency(
    matrix=PRODUCTS["bf16"] / GPUS["h100"].matrix_flops,
    attention=ATTENTION / 2 / GPUS["h100"].matrix_flops,
    memory=MEMORY / GPUS["h100"].memory_bandwidth,
    collectives=1.0,
)
"""The rates of the replay as those of a plan."""


@pytest.mark.parametrize(
    ("stem", "ranks", "expert"), [("dbrx-moe-a", 64, 1), ("dbrx", 3072, 8), ("dbrx", 3072, 16)]
)
def test_a_plan_at_the_replay_s_rates_takes_as_long(stem: str, ranks: int, expert: int) -> None:
    """Within a tenth: in the plan, weights and exchange share the network, in the replay each has its own."""
    if not hasattr(FSDPModule, "set_reduce_scatter_max_input_buffers"):
        pytest.skip("before torch 2.15 the experts' reduce-scatter ends before the next may begin")
    file = YAMLS / f"{stem}.yaml"
    batch = ranks * load_recipe(file).training.microbatch_sequences
    keys = [f"parallelism.expert={expert}", f"training.global_batch_sequences={batch}"]
    of_20, of_40 = (
        make_plan(load_recipe(file, [*keys, f"model.n_layers={n}"]), ranks, GPUS["h100"], efficiency=REPLAYED)
        for n in (20, 40)
    )
    replayed = layer_of(stem, ranks, f"parallelism.expert={expert}")
    assert 1000 / 20 * (of_40.step_seconds - of_20.step_seconds) == pytest.approx(replayed.total, rel=0.1)


def test_tokens_that_cross_once_per_node_leave_less_open() -> None:
    straight, once = (
        layer_of("dbrx", 3072, "parallelism.expert=16", *keys)
        for keys in ((), ("parallelism.exchange_node_ranks=8",))
    )
    assert once.open < 0.8 * straight.open and once.total < straight.total


def test_layers_that_stay_gathered_copy_their_weights_once() -> None:
    freed, kept = (
        layer_of("dbrx-moe-a", 64, "parallelism.expert=1", gathers_all=kept) for kept in (False, True)
    )
    assert kept.total < 0.985 * freed.total and kept.links < 0.8 * freed.links


def test_fsdp2_by_itself_hides_less() -> None:
    ours, theirs = (
        layer_of("dbrx-moe-a", 64, "parallelism.expert=1", is_ahead=is_ahead) for is_ahead in (True, False)
    )
    assert ours.open < 0.5 * theirs.open and ours.total < theirs.total
    assert ours.links == pytest.approx(theirs.links, rel=0.02), "the same traffic"
