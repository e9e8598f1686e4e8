"""Speed of one GPU, product by product and pass by pass: `python -m launch.experiments.bench.gpu`.

Measures the figures on which a plan rests, and their alternatives, in one process: grouped products as a loop
and as one kernel, attention by each of torch's implementations, the loss by chunk size, element-wise passes,
the host's launch overhead, and optimizer steps of a slice of a recipe. It needs PyTorch 2.10 or newer and
neither Composer nor a network, so that it runs in a vendor's container unchanged.

Shapes: E experts, R routed rows, D model width, F expert hidden size, T tokens, V vocabulary, B sequences,
H query heads, G key-value heads, S tokens per sequence, W head width.
"""

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.layout.optim import build_optimizer, clip_gradients
from train.model import loss as losses
from train.model.attention import (
    block_attention,
    document_attention,
    document_blocks,
    document_offsets,
    has_varlen,
)
from train.model.decoder import Decoder
from train.model.init import initialize
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Recipe
from train.record.command import Figures, command

BF16 = torch.bfloat16
PAIRS = 10
"""Number of timed calls, of which the median counts, after two warm-up calls."""


class Measurement(NamedTuple):
    """One measurement."""

    part: str
    what: str
    found: str


class Grouped(NamedTuple):
    """Experts of one rank, and the rows routed to them."""

    name: str
    experts: int
    width: int
    hidden: int
    rows: int


EXPERTS = (
    Grouped("MoE-A, 16 experts", 16, 2048, 3584, 131_072),
    Grouped("DBRX, 2 of 16 experts", 2, 6144, 10_752, 32_768),
    Grouped("DBRX, 1 of 16 experts", 1, 6144, 10_752, 32_768),
    Grouped("Qwen3-30B-A3B, 128 experts", 128, 2048, 768, 262_144),
    Grouped("DeepSeek-V3, 8 of 256 experts", 8, 7168, 2048, 32_768),
)
HEADS = (
    ("MoE-A, 8 x 4,096", 8, 16, 8, 4096),
    ("DBRX, 2 x 4,096", 2, 48, 8, 4096),
    ("DBRX, 1 x 32,768", 1, 48, 8, 32_768),
)
HEAD_WIDTH = 128


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--recipe", default="yamls/dbrx-moe-a.yaml", help="recipe of which a slice is trained"
    )
    parser.add_argument(
        "--only", nargs="*", choices=sorted(PARTS), default=sorted(PARTS), help="measure only these parts"
    )


@command(
    "python -m launch.experiments.bench.gpu",
    __doc__,
    add_arguments,
    json="write the figures as JSON too",
    name="bench.gpu",
)
def main(options: Namespace) -> Figures:
    """Prints a Markdown table, each row as soon as it is measured."""
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here", remedy="run it on a machine with one")
    print("| part | what | found |\n|---|---|---:|", flush=True)
    found = []
    for part in options.only:
        for figure in PARTS[part](load_recipe(options.recipe)):
            found.append(figure)
            print(f"| {figure.part} | {figure.what} | {figure.found} |", flush=True)
        torch.cuda.empty_cache()
    return Figures([figure._asdict() for figure in found])


def machine(_: Recipe) -> Iterator[Measurement]:
    """Measures the GPU, its link to the host, and the host's cost of a launch and of a synchronisation."""
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    yield Measurement("machine", name, f"{memory / 2**30:.1f} GiB, torch {torch.__version__}")
    square = _random(8192, 8192)
    yield Measurement("machine", "bf16 product of 8,192", _tflops(2 * 8192**3, _ms(lambda: square @ square)))
    on_host = torch.empty(2**30, dtype=torch.uint8).pin_memory()
    on_gpu = torch.empty_like(on_host, device="cuda")
    beside = torch.empty_like(on_gpu)
    copied = 2 * on_gpu.nbytes / _ms(lambda: beside.copy_(on_gpu)) / 1e9
    yield Measurement("machine", "copy in GPU memory, read and written", f"{copied:.2f} TB/s")
    for what, target, source in (("host to GPU", on_gpu, on_host), ("GPU to host", on_host, on_gpu)):

        def copy(target: Tensor = target, source: Tensor = source) -> None:
            target.copy_(source, non_blocking=True)

        yield Measurement("machine", f"{what}, pinned", f"{on_host.nbytes / _ms(copy) / 1e6:.1f} GB/s")
    small = _random(64)
    yield Measurement("machine", "host time of a launch", f"{_host_us(lambda: small.add_(1.0), 5000):.1f} us")
    yield Measurement("machine", "a number read back", f"{_host_us(small[0].item, 200):.1f} us")


def grouped(_: Recipe) -> Iterator[Measurement]:
    """Measures products of all experts: one per expert, and torch's grouped product in one launch."""
    for shape in EXPERTS:
        for is_even in (True, False) if shape.experts > 1 else (True,):
            yield from _grouped(shape, is_even)


def _grouped(shape: Grouped, is_even: bool) -> Iterator[Measurement]:
    sizes_E = _row_counts(shape, is_even)
    ends_E = sizes_E.cumsum(0)
    offsets_E = ends_E.int().cuda()
    spans = [slice(end - size, end) for size, end in zip(sizes_E.tolist(), ends_E.tolist(), strict=True)]
    x_RD, grad_RF = _random(shape.rows, shape.width), _random(shape.rows, shape.hidden)
    weight_EFD = _random(shape.experts, shape.hidden, shape.width)
    out_RF, grad_RD, grad_EFD = (torch.empty_like(t) for t in (grad_RF, x_RD, weight_EFD))

    def forward() -> None:
        for rows, weight_FD in zip(spans, weight_EFD, strict=True):
            torch.mm(x_RD[rows], weight_FD.t(), out=out_RF[rows])

    def gradient_of_rows() -> None:
        for rows, weight_FD in zip(spans, weight_EFD, strict=True):
            torch.mm(grad_RF[rows], weight_FD, out=grad_RD[rows])

    def gradient_of_weights() -> None:
        for rows, target_FD in zip(spans, grad_EFD, strict=True):
            torch.mm(grad_RF[rows].t(), x_RD[rows], out=target_FD)

    flops = 2 * shape.rows * shape.width * shape.hidden
    label = f"{shape.name}, {'equal' if is_even else 'unequal'} counts"
    for what, loop, left, right in (
        ("forward", forward, x_RD, weight_EFD.mT),
        ("gradient of rows", gradient_of_rows, grad_RF, weight_EFD),
        ("gradient of weights", gradient_of_weights, grad_RF.t(), x_RD),
    ):

        def in_one(left: Tensor = left, right: Tensor = right) -> Tensor:
            out: Tensor = functional.grouped_mm(left, right, offs=offsets_E)  # type: ignore[attr-defined, unused-ignore]
            return out

        found = f"loop {_tflops(flops, _ms(loop))}, grouped_mm {_tflops(flops, _ms(in_one))}"
        yield Measurement("grouped product", f"{label}, {what}", found)


def _row_counts(shape: Grouped, is_even: bool) -> Tensor:
    """Rows of each expert, multiples of 8 except the last: equal, or differing by up to a factor of 3."""
    generator = torch.Generator().manual_seed(1)
    share_E = torch.ones(shape.experts) if is_even else torch.rand(shape.experts, generator=generator) + 0.5
    counts_E = (share_E / share_E.sum() * shape.rows / 8).floor().long() * 8
    counts_E[-1] += shape.rows - counts_E.sum()
    return counts_E


def attention(_: Recipe) -> Iterator[Measurement]:
    """Measures causal attention: one document by SDPA, two per sequence by both kernels for documents."""
    for shape in HEADS:
        yield from _attention(*shape)


def _attention(name: str, batch: int, heads: int, kv_heads: int, length: int) -> Iterator[Measurement]:
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (_random(batch, count, length, HEAD_WIDTH).requires_grad_() for count in counts)
    documents_BS = (torch.arange(length) * 2 // length).int().expand(batch, length).cuda()
    blocks = document_blocks(documents_BS)

    def mask() -> object:
        return document_blocks(documents_BS)

    def shared() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def repeated() -> Tensor:
        k_BHSW, v_BHSW = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        return functional.scaled_dot_product_attention(q, k_BHSW, v_BHSW, is_causal=True)

    def flex() -> Tensor:
        return block_attention(q, k, v, blocks)

    q_THR, k_TGR, v_TGR = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in (q, k, v))
    documents = document_offsets(documents_BS)

    def one_by_one() -> Tensor:
        return document_attention(q_THR, k_TGR, v_TGR, *documents)

    flops = 4 * batch * heads * HEAD_WIDTH * length * length / 2
    ways: list[tuple[str, Callable[[], Tensor], float]] = [
        ("SDPA, enable_gqa", shared, 1.0),
        ("SDPA, repeated heads", repeated, 1.0),
        ("FlexAttention, 2 documents", flex, 0.5),
    ]
    if has_varlen():
        ways.append(("variable length, 2 documents", one_by_one, 0.5))
    for what, attend, seen in ways:
        grad = torch.randn_like(attend())

        def both(attend: Callable[[], Tensor] = attend, grad: Tensor = grad) -> object:
            return torch.autograd.grad(attend(), (q, k, v), grad)

        forward = _ms(attend, 5)
        backward = _ms(both, 5) - forward
        found = f"{_tflops(seen * flops, forward)} forward, {_tflops(2.5 * seen * flops, backward)} backward"
        yield Measurement("attention", f"{name}, {what}", found)
    yield Measurement("attention", f"{name}, block mask", f"{_ms(mask, 5):.2f} ms")


def loss(recipe: Recipe) -> Iterator[Measurement]:
    """Measures forward and backward pass of the chunked loss over 32,768 tokens, weights in fp32."""
    tokens, width, vocabulary = 32_768, recipe.model.d_model, recipe.model.vocab_size
    hidden_TD = _random(tokens, width).requires_grad_()
    weight_VD = (_random(vocabulary, width).float() * 0.02).requires_grad_()
    targets_T = torch.randint(vocabulary, (tokens,), device="cuda")

    def both(chunk: int) -> object:
        with torch.autocast("cuda", BF16):
            total, _ = losses.chunked_cross_entropy(hidden_TD, weight_VD, targets_T, chunk)
        return torch.autograd.grad(total, (hidden_TD, weight_VD))

    for chunk in (1024, 4096, 16_384):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        took = _ms(lambda chunk=chunk: both(chunk), 5)  # type: ignore[misc]
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
        rate = _tflops(6 * tokens * width * vocabulary, took)
        yield Measurement(
            "loss", f"chunks of {chunk:,} tokens", f"{took:.1f} ms, {rate}, peak {peak:.2f} GiB"
        )


def elementwise(recipe: Recipe) -> Iterator[Measurement]:
    """Measures element-wise passes, eager and compiled; bandwidth is that of the least possible traffic."""
    tokens, width, hidden = 32_768, recipe.model.d_model, recipe.model.ffn_hidden_size
    x, y = _random(tokens, width), _random(tokens, width)
    gate, up = _random(4 * tokens, hidden), _random(4 * tokens, hidden)
    norm = nn.LayerNorm(width, bias=False, device="cuda")

    def normed() -> Tensor:
        with torch.autocast("cuda", BF16):
            out: Tensor = norm(x)
        return out

    def added() -> Tensor:
        with torch.autocast("cuda", BF16):
            out: Tensor = norm(x + y)
        return out

    def gated() -> Tensor:
        return functional.silu(gate) * up

    for what, work, least in (
        ("LayerNorm under autocast", normed, 2 * x.nbytes),
        ("add and LayerNorm", added, 3 * x.nbytes),
        ("silu(gate) * up", gated, 3 * gate.nbytes),
    ):
        plain, compiled = _ms(work), _ms(torch.compile(work))
        rates = f"{least / plain / 1e9:.2f} and {least / compiled / 1e9:.2f} TB/s"
        yield Measurement("element-wise", what, f"{plain:.3f} ms, compiled {compiled:.3f} ms ({rates})")


def step(recipe: Recipe) -> Iterator[Measurement]:
    """Measures full optimizer steps of a slice of the recipe, and if gradients repeat bit for bit."""
    for chunk in (1024, 4096):
        yield from _step(recipe, chunk)


def _step(recipe: Recipe, chunk: int, layers: int = 4, sequences: int = 8) -> Iterator[Measurement]:
    model, length = replace(recipe.model, n_layers=layers), recipe.data.sequence_tokens
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(model.vocab_size, (sequences, length), generator=generator).cuda()
    documents_BS = (torch.arange(length) >= length // 2).int().expand(sequences, length).cuda()
    decoder = Decoder(model, device="meta", loss_chunk_tokens=chunk)
    decoder.to_empty(device="cuda")
    initialize(decoder, model, recipe.seed)
    optimizer = build_optimizer(decoder, recipe.optimizer)

    def gradients() -> list[Tensor]:
        decoder.zero_grad(set_to_none=True)
        with torch.autocast("cuda", BF16):
            out = decoder(ids_BS, documents_BS, ids_BS.roll(-1, 1))
        (out.loss_sum / ids_BS.numel() + 0.05 * out.balance_loss).backward()
        return [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]

    def whole() -> None:
        gradients()
        clip_gradients(decoder.parameters(), 1.0)
        optimizer.step()

    torch.cuda.reset_peak_memory_stats()
    took = _ms(whole, 5)
    peak = torch.cuda.max_memory_allocated() / 2**30
    flops = sizes.flops_per_token_training(model, length).total * ids_BS.numel()
    name = f"{recipe.name}, {layers} layers, {sequences} x {length:,} tokens, loss in chunks of {chunk:,}"
    rate = f"{ids_BS.numel() / took * 1e3:,.0f} tokens/s, {flops / took / 1e9:.0f} TFLOP/s"
    yield Measurement("step", name, f"{took:.1f} ms, {rate}, peak {peak:.2f} GiB")
    first, again = gradients(), gradients()
    equal = [torch.equal(one, other) for one, other in zip(first, again, strict=True)]
    yield Measurement(
        "step", "gradients of a repeated pass", f"{sum(equal)} of {len(equal)} equal bit for bit"
    )


PARTS: dict[str, Callable[[Recipe], Iterator[Measurement]]] = {
    "machine": machine,
    "grouped": grouped,
    "attention": attention,
    "loss": loss,
    "elementwise": elementwise,
    "step": step,
}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def _ms(work: Callable[[], object], times: int = PAIRS) -> float:
    """Median milliseconds of a call on the GPU, by events, after two warm-up calls."""
    work()
    work()
    torch.cuda.synchronize()
    found = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def _host_us(work: Callable[[], object], times: int) -> float:
    """Mean host microseconds per call."""
    work()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        work()
    took = time.perf_counter() - begun
    torch.cuda.synchronize()
    return took / times * 1e6


def _tflops(flops: float, milliseconds: float) -> str:
    return f"{flops / milliseconds / 1e9:.0f} TFLOP/s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
