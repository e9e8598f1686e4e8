"""The plan of a save: each rank's part of a checkpoint, agreed on by all that write."""

import dataclasses
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor


class SavePlanner(dcp.DefaultSavePlanner):
    """Plans once: while every rank's part of the plan stays the same, none is sent or made again.

    Rank 0 would otherwise gather all plans, make one, and scatter its parts again in every save, in the
    process that trains. torch's ``enable_plan_caching`` keeps its plans in the class: other models' savers in
    the process and forked ranks would find them there.

    Args:
        has_own_names: this rank has other weights than the coordinator.
    """

    def __init__(self, *, has_own_names: bool = False) -> None:
        super().__init__()
        self.has_own_names = has_own_names
        self._sent: SavePlan | None = None
        """This rank's own plan, as in the last save that all ranks planned."""
        self._final: SavePlan | None = None
        """This rank's part of the plan that was made of all of them."""
        self._known: list[SavePlan] = []
        """On the coordinator: the ranks' own plans."""
        self._made: Metadata | None = None
        """On the coordinator: the metadata of the plan that was made of them."""

    def create_local_plan(self) -> SavePlan:
        """Returns this rank's own plan, or an unusable one if it is the same as before.

        Layers are alike, and so are a weight and its moments: of 1,292 items of a rank of DBRX a dozen differ
        in more than their names. torch plans one of each, which takes it milliseconds; items of one kind
        share what is equal, so that it is pickled, sent and read once.
        """
        whole = self.state_dict
        kinds = {name: _kind(name, value) for name, value in whole.items()}
        first = {kind: name for name, kind in reversed(kinds.items())}
        self.state_dict = {name: whole[name] for name in first.values()}
        try:
            plan = super().create_local_plan()
        finally:
            self.state_dict = whole
        made: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            made.setdefault(item.index.fqn, []).append(item)
        items = [_named(item, name) for name, kind in kinds.items() for item in made.get(first[kind], [])]
        # Where the names' places in the state are the same on every rank, the coordinator's are enough.
        places = plan.planner_data if self.is_coordinator or self.has_own_names else {}
        self._own = self.plan = dataclasses.replace(plan, items=items, planner_data=places)
        return SavePlan([], usable=False) if self._own == self._sent else self._own

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Makes the plan of all ranks' own, or returns unusable parts if none has changed."""
        if self._made is not None and not any(plan.usable for plan in all_plans):
            return all_plans, self._made
        pairs = zip(all_plans, self._known or all_plans, strict=True)
        self._known, self._made = [new if new.usable else known for new, known in pairs], None
        # A copy, since torch 2.7 changes the list.
        parts, self._made = super().create_global_plan(list(self._known))
        # Only the metadata needs the names' places.
        return [dataclasses.replace(part, planner_data=None) for part in parts], self._made

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Returns what this rank writes, once all ranks have agreed on the plan."""
        self._sent = self._own
        self._final = new_plan if new_plan.usable else self._final
        assert self._final is not None, "the first plan is sent"
        return super().finish_plan(self._final)


def _kind(name: str, value: Any) -> Any:
    """Returns what decides how a value is planned; what is no tensor is a kind of its own."""
    if not isinstance(value, Tensor):
        return name
    local = value.to_local() if isinstance(value, DTensor) else value
    spread = (value.device_mesh, value.placements) if isinstance(value, DTensor) else ()
    return value.shape, spread, local.dtype, local.layout, local.requires_grad, local.is_pinned()


def _named(item: WriteItem, name: str) -> WriteItem:
    """Returns an item of the same part of another value."""
    return dataclasses.replace(item, index=MetadataIndex(name, item.index.offset, item.index.index))
