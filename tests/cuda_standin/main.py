"""`train/main.py` on the stand-in: `composer -n 2 tests/cuda_standin/main.py RECIPE [key=value ...]`.

What depends on a value that a kernel computed goes another way here: Composer's loop, sampled text, and what
compares a batch's positions, summed on the device, with the plan. All else of ours runs as it is. Each rank
writes its counts to `STANDIN_OUTPUT` with its number appended.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# ruff: noqa: E402  (`python tests/cuda_standin/main.py` puts that folder on the path)
sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist
from composer import Trainer
from composer.core import Event
from composer.trainer.trainer import TrainerMode
from torch.distributed import distributed_c10d

from tests.cuda_standin import inside
from train.generate import sample_text
from train.main import main
from train.step.data_log import DataLog

GROUP_ARGUMENT = {
    "broadcast_object_list": 2,
    "all_gather_object": 2,
    "gather_object": 3,
    "scatter_object_list": 3,
}
"""Collectives of Python objects, which compute their sizes on the device, and where they take the group."""
_gloo: list[dist.ProcessGroup] = []


def send_objects_over_gloo() -> None:
    """Lets collectives of Python objects go over gloo."""
    for name, place in GROUP_ARGUMENT.items():
        wrapped = _over_gloo(getattr(distributed_c10d, name), place)
        setattr(distributed_c10d, name, wrapped)
        setattr(dist, name, wrapped)


def _over_gloo(real: Any, place: int) -> Any:
    def call(*args: Any, **keywords: Any) -> Any:
        group = args[place] if len(args) > place else keywords.get("group")
        if group is not None and dist.get_backend(group) != "nccl":
            return real(*args, **keywords)
        if not _gloo:
            _gloo.append(dist.new_group(backend="gloo"))
        return real(*args[:place], **{**keywords, "group": _gloo[0]})

    return call


def batches(trainer: Trainer, mode: TrainerMode) -> Iterator[Any]:
    """Composer's own asks the device whether any rank has a batch left."""
    for batch in iter(trainer.state.dataloader):
        if mode is TrainerMode.TRAIN:
            trainer.engine.run_event(Event.BEFORE_DATALOADER)
        yield batch


inside.prepare()
# Sampling draws from what kernels compute, and asserts on it.
sample_text.write_sample = lambda *_: None
DataLog._require_own = lambda *_: None
send_objects_over_gloo()
Trainer._iter_dataloader = batches
inside.reset()
status = main(sys.argv[1:])
if "STANDIN_OUTPUT" in os.environ:
    Path(f"{os.environ['STANDIN_OUTPUT']}.{os.environ['RANK']}").write_text(json.dumps(inside.counts()))
sys.exit(status)
