"""Peak memory of the loss: chunked against plain cross entropy on full logits, with equal gradients."""

import multiprocessing
import resource
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.nn import functional

from train.model.loss import chunked_cross_entropy

# Shapes: T tokens, D model, V vocabulary.

TOKENS, WIDTH, VOCABULARY, CHUNK = 4096, 256, 100_352, 1024


def loss_memory(raw: dict[str, float]) -> dict[str, float]:
    """Peak bytes of each side above its inputs, each in its own process.

    Raises:
        AssertionError: if the two sides' gradients differ.
    """
    plain_bytes, plain = _measure("plain")
    chunked_bytes, chunked = _measure("chunked")
    for ours, theirs in zip(chunked, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), "the two sides' gradients differ"
    raw |= {"loss_plain_peak_MB": plain_bytes / 1e6, "loss_chunked_peak_MB": chunked_bytes / 1e6}
    return {"loss_memory_ratio": chunked_bytes / plain_bytes}


def _measure(side: str) -> tuple[int, list[Tensor]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(side, theirs))
    process.start()
    theirs.close()
    peak, hidden, weight = ours.recv()
    process.join()
    return peak, [torch.from_numpy(hidden), torch.from_numpy(weight)]


def _child(side: str, result: Connection) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight_VD = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.02).requires_grad_()
    targets_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    # A small warm-up pass, so that the peak does not include libraries' initialisation.
    _loss(side, hidden_TD[:8], weight_VD[:64], targets_T[:8] % 64).backward()
    hidden_TD.grad = weight_VD.grad = None
    before = _resident_bytes()
    _loss(side, hidden_TD, weight_VD, targets_T).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    result.send((peak - before, hidden_TD.grad.numpy(), weight_VD.grad[::97].contiguous().numpy()))


def _loss(side: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    if side == "plain":
        return functional.cross_entropy(hidden_TD @ weight_VD.T, targets_T, reduction="sum")
    loss_sum, _ = chunked_cross_entropy(hidden_TD, weight_VD, targets_T, CHUNK)
    return loss_sum


def _resident_bytes() -> int:
    with open("/proc/self/statm") as stream:  # noqa: PTH123
        return int(stream.read().split()[1]) * resource.getpagesize()
