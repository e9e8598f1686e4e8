"""Plans of tokens sent once per node: on how many nodes they lie, what they send, and when it is faster."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.plan.hardware import GPUS
from launch.plan.nodes import nodes_per_token
from launch.plan.search import choice_of, search
from launch.plan.step import Plan, make_plan
from launch.plan.traffic import CollectiveKind
from train.recipe.reading import load_recipe
from train.recipe.schema import Moe, Parallelism

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
H100 = GPUS["h100"]


@pytest.mark.parametrize(
    ("moe", "nodes"),
    [
        (Moe(experts=16, top_k=4), 4),
        (Moe(experts=64, top_k=8), 8),
        (Moe(experts=64, top_k=8, groups=8, top_groups=4), 8),
        (Moe(experts=64, top_k=6, groups=4, top_groups=2), 8),
        (Moe(experts=64, top_k=6, groups=8, top_groups=3), 4),
        (Moe(experts=48, top_k=5, groups=3, top_groups=2), 4),
    ],
)
def test_nodes_per_token_are_those_of_drawn_experts(moe: Moe, nodes: int) -> None:
    """Groups that are nodes, are parts or several of them, and lie across their borders."""
    tokens, generator = 20_000, torch.Generator().manual_seed(0)
    drawn_TG = torch.rand(tokens, moe.groups, generator=generator)
    is_used_TG = torch.zeros_like(drawn_TG).scatter(1, drawn_TG.topk(moe.top_groups).indices, 1)
    drawn_TE = torch.rand(tokens, moe.experts, generator=generator)
    of_group = moe.experts // moe.groups
    experts_TK = (drawn_TE * is_used_TG.repeat_interleave(of_group, dim=1)).topk(moe.top_k).indices
    is_there_TM = torch.zeros(tokens, nodes).scatter(1, experts_TK // (moe.experts // nodes), 1)
    layout = Parallelism(expert=2 * nodes, exchange_node_ranks=2)
    assert nodes_per_token(moe, layout) == pytest.approx(float(is_there_TM.sum(dim=1).mean()), rel=0.01)
    assert nodes_per_token(moe, replace(layout, exchange_node_ranks=None)) == 0


def test_tokens_sent_once_per_node_save_traffic_and_take_memory() -> None:
    """Of DBRX, whose four experts of sixteen lie on 1.9 of two nodes."""
    own = load_recipe(YAMLS / "dbrx.yaml", ["parallelism.replicate=4"])

    def of(local: int | None) -> Plan:
        layout = replace(own.parallelism, expert=16, exchange_node_ranks=local)
        return make_plan(replace(own, parallelism=layout), 3072, H100)

    def network(plan: Plan) -> float:
        tokens = [each for each in plan.collectives if each.what.startswith("tokens")]
        assert all(each.kind is CollectiveKind.all_to_all for each in tokens)
        return sum(each.calls * each.link_bytes(8).network for each in tokens)

    straight, once = of(None), of(8)
    nodes = 2 * (1 - math.comb(8, 4) / math.comb(16, 4))
    assert network(once) / network(straight) == pytest.approx(nodes / 4)
    assert once.step_seconds < straight.step_seconds
    assert once.seconds.memory > straight.seconds.memory
    assert 0 < once.memory.total - straight.memory.total < 0.02 * straight.memory.total


def test_the_search_sends_tokens_once_per_node() -> None:
    """And says so, where groups span nodes."""
    found = search(load_recipe(YAMLS / "dbrx-moe-a.yaml"), 64, H100)
    layouts = [plan.recipe.parallelism for plan in found]
    assert {each.exchange_node_ranks for each in layouts if each.expert > 8} == {None, 8}
    assert {each.exchange_node_ranks for each in layouts if each.expert <= 8} == {None}
    spanning = next(plan.recipe for plan in found if plan.recipe.parallelism.expert > 8)
    assert spanning.parallelism.exchange_node_ranks == 8
    assert "parallelism.exchange_node_ranks=8" in choice_of(spanning).overrides()
