"""The plan of a first save, as rank 0 makes it of the plans of all ranks that write.

The other ranks' plans are what the real planner says at their places in the mesh.
"""

import dataclasses
import pickle
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from train.checkpoint.planning import SavePlanner

REPEATS = 5
"""Times that one plan is pickled and read."""
PASSES = 3
"""Times that a save is ended; the shortest counts."""
MOST_ITEMS, MOST_PAIRS = 400_000, 30_000_000
"""Items that are planned here, and pairs of writers' items: older torch compares each pair."""


@dataclass(frozen=True)
class Planning:
    """Costs of planning a first save; a later one sends no plan unless the state has changed its form."""

    writers: int
    items: int
    """Of this rank's own plan."""
    plan_bytes: int
    """Of this rank's own plan, as it is sent."""
    seconds: dict[str, float]
    """By part; on rank 0 those of gathering and scattering are of one plan, times the number of plans."""
    gathered_bytes: int = 0
    """On rank 0: of all ranks' plans."""
    metadata_bytes: int = 0
    """On rank 0: of the checkpoint's `.metadata`."""
    finishing_seconds: float = 0.0
    """On rank 0, in every save: reading what each rank wrote, writing `.metadata` and sending it to all."""
    state_bytes: int = 0
    """On rank 0: of the whole checkpoint's tensors."""
    is_scaled: bool = False
    """Only a part of the state was planned, for time; seconds and bytes are scaled to all of it."""


def rehearse_planning(state: dict[str, Any], writers: list[int], rank: int) -> Planning:
    """Plans a first save of a state as one of its writers; as rank 0 also for all the others.

    Args:
        state: model and optimizer as of :func:`torch.distributed.checkpoint.state_dict.get_state_dict`.
        writers: the ranks that write; rank 0 is the first.
        rank: this rank.
    """
    seconds: dict[str, float] = {}
    planner = SavePlanner()
    with timed(seconds, "own plan"):
        planner.set_up_planner(state, is_coordinator=rank == 0)
        own = planner.create_local_plan()
    found = Planning(len(writers), len(own.items), len(pickle.dumps(own)), seconds)
    if rank != 0:
        return found
    flat, _ = flatten_state_dict(state)
    most = max(1, min(MOST_ITEMS // len(writers), MOST_PAIRS // len(writers) ** 2))
    every = -(-len(flat) // most)
    planner, part = SavePlanner(), dict(list(flat.items())[::every])
    planner.set_up_planner(part, is_coordinator=True)
    own_part = planner.create_local_plan()
    scale = len(own.items) / len(own_part.items)
    plans = [own_part, *plans_of(part, writers[1:])]
    sent = pickle.dumps(plans[-1])
    repeats = len(writers) / REPEATS * scale
    with timed(seconds, "gathering", repeats):
        for _ in range(REPEATS):
            pickle.loads(sent)
    with timed(seconds, "one plan of all", scale):
        parts, metadata = planner.create_global_plan(plans)
    with timed(seconds, "scattering", repeats):
        for _ in range(REPEATS):
            pickle.dumps(parts[-1])
    # The first pass also takes memory from the system, and one that other work disturbs tells nothing.
    finishing, metadata_bytes = min(_finish(parts, metadata) for _ in range(PASSES))
    return dataclasses.replace(
        found,
        gathered_bytes=found.plan_bytes + int((len(writers) - 1) * len(sent) * scale),
        metadata_bytes=int(metadata_bytes * scale),
        finishing_seconds=finishing * scale,
        state_bytes=sum(value.nbytes for value in flat.values() if isinstance(value, Tensor)),
        is_scaled=every > 1,
    )


def plans_of(state: dict[str, Any], ranks: list[int]) -> list[SavePlan]:
    """Returns what the planners of other ranks than this one would send.

    Args:
        state: this rank's state, flat.
        ranks: the others.
    """
    meshes = {value.device_mesh for value in state.values() if isinstance(value, DTensor)}
    plans = []
    for rank in ranks:
        planner = SavePlanner()
        planner.set_up_planner(state)
        with standing_at(rank, meshes):
            plans.append(planner.create_local_plan())
    return plans


@contextmanager
def standing_at(rank: int, meshes: set[DeviceMesh]) -> Iterator[None]:
    """Gives meshes another rank's place in them while the context is entered."""
    own: dict[Any, Any] = {mesh: mesh.get_coordinate() for mesh in meshes}
    for mesh, place in own.items():
        there = (mesh.mesh == rank).nonzero()[0].tolist()
        mesh._coordinate_on_dim = type(place)(there)  # a list or a tuple, by torch's version
    try:
        yield
    finally:
        for mesh, place in own.items():
            mesh._coordinate_on_dim = place


def written_bytes(item: WriteItem) -> int:
    """Returns the bytes of a tensor's part, 0 of what is no tensor."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


@contextmanager
def timed(seconds: dict[str, float], part: str, times: float = 1.0) -> Iterator[None]:
    """Notes the seconds of a core that a part takes, ``times`` over."""
    begun = time.process_time()
    yield
    seconds[part] = times * (time.process_time() - begun)


def _finish(parts: list[SavePlan], metadata: Metadata) -> tuple[float, int]:
    """Ends a save in which all ranks have written their parts; returns seconds, and bytes of `.metadata`."""
    results = [
        [
            WriteResult(item.index, size, _StorageInfo(f"__{place}_0.distcp", 0, size))
            for item, size in ((item, written_bytes(item)) for item in part.items)
        ]
        for place, part in enumerate(parts)
    ]
    seconds: dict[str, float] = {}
    sent = pickle.dumps(results[-1])
    with timed(seconds, "reading"):
        for _ in range(REPEATS):
            pickle.loads(sent)
    with tempfile.TemporaryDirectory() as folder:
        with timed(seconds, "writing"):
            FileSystemWriter(folder).finish(metadata, results)
            pickle.dumps(metadata)
        written = (Path(folder) / ".metadata").stat().st_size
    return seconds["reading"] * len(parts) / REPEATS + seconds["writing"], written
