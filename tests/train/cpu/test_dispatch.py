"""Dispatch by device: CPU tensors use the CPU version, all others the plain one."""

import torch
from torch import Tensor

from train.cpu.dispatch import with_cpu_version


def on_cpu(x: Tensor, word: str) -> str:
    return f"cpu {word}"


@with_cpu_version(on_cpu)
def anywhere(x: Tensor, word: str) -> str:
    """The plain version."""
    return f"plain {word}"


def test_the_device_of_the_first_argument_decides() -> None:
    assert anywhere(torch.ones(1), word="a") == "cpu a"
    assert anywhere(torch.ones(1, device="meta"), "b") == "plain b"
    assert anywhere.plain(torch.ones(1), "c") == "plain c"
    assert (anywhere.__name__, anywhere.__doc__) == ("anywhere", "The plain version.")
