"""Nodes that a token's experts lie on, on average: what an exchange once per node sends.

Needs no torch. Computed for even routing: every set of K experts is as likely as any other, among those of
the groups that a token may use, and every set of groups too.
"""

import functools
import math
from collections import Counter

from train.recipe.schema import Moe, Parallelism


def nodes_of_group(layout: Parallelism) -> int:
    """Returns the nodes that an expert group spans, of an exchange once per node; else 1."""
    return layout.expert // (layout.exchange_node_ranks or layout.expert)


def nodes_per_token(moe: Moe | None, layout: Parallelism) -> float:
    """Returns how many nodes a token crosses to, its own included; 0 if it goes straight to its experts."""
    if moe is None or layout.exchange_node_ranks is None:
        return 0.0
    return expected_nodes(moe.experts, moe.top_k, nodes_of_group(layout), moe.groups, moe.top_groups)


@functools.lru_cache(maxsize=256)  # the plan's search asks for each layout with many microbatches
def expected_nodes(experts: int, top_k: int, nodes: int, groups: int = 1, top_groups: int = 1) -> float:
    """Returns the expected number of distinct nodes of a token's experts.

    Node n has experts n E / N to (n + 1) E / N. With one group it is N (1 - C(E - E / N, K) / C(E, K)); with
    several, the mean of that over the sets of groups that a token may use.

    Args:
        experts: E, a multiple of the nodes and of the groups.
        top_k: K.
        nodes: N.
        groups: of consecutive experts.
        top_groups: groups that a token uses.
    """
    of_node, of_group = experts // nodes, experts // groups
    usable = of_group * top_groups
    found = 0.0
    for node in range(nodes):
        # Sets of groups, by how many there are and how many experts of the node are in them.
        sets = Counter({(0, 0): 1})
        for group in range(groups):
            first, end = (
                max(node * of_node, group * of_group),
                min((node + 1) * of_node, (group + 1) * of_group),
            )
            for (count, there), ways in list(sets.items()):
                sets[count + 1, there + max(0, end - first)] += ways
        missed = sum(
            ways * math.comb(usable - there, top_k)
            for (count, there), ways in sets.items()
            if count == top_groups
        )
        found += 1 - missed / (math.comb(groups, top_groups) * math.comb(usable, top_k))
    return found
