"""Speed and memory against other frameworks: `python -m launch.experiments.bench`.

Both sides of a ratio alternate in one process, A B A B, and the ratio is that of their medians. Noisy
neighbours on the machine slow both sides equally; a figure without its ratio says little.
"""

import datetime
import gc
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from launch.experiments.bench.loss import loss_memory
from launch.experiments.bench.peers import (
    TORCHTITAN,
    LossOf,
    experts_in_fp32,
    hugging_face_dbrx,
    hugging_face_mixtral,
    llm_foundry_mpt,
    torchtitan_moe,
)
from train.layout.device import describe_hardware, measured_peak_flops, supports_bf16
from train.layout.optim import build_optimizer, clip_gradients
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.moe import MoE
from train.recipe.schema import Model, Moe, Optimizer
from train.recipe.sizes import flops_per_token_training
from train.record.command import Figures, command
from train.record.provenance import git_commit
from train.record.run_tracker import METRICS_FILE
from train.record.step_log import read_steps
from train.record.tables import text_table

# Shapes: B sequences, S tokens, T = B x S, D model, F expert hidden, E experts, K experts per token.

BENCH_MODEL = Model(
    d_model=256,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=448,
    vocab_size=8192,
    max_sequence_tokens=512,
    clip_qkv=8.0,
    moe=Moe(experts=16, top_k=4),
)
SEQUENCES, TOKENS = 8, 512
GOALS = {
    "vs_hf_bf16": (">=", 1.5),
    "vs_hf_fp32": (">=", 1.5),
    "vs_hf_mixtral_bf16": (">=", 1.5),
    "vs_hf_mixtral_fp32": (">=", 1.5),
    "vs_llmfoundry": (">=", 1.6),
    "moe_vs_torchtitan_fp32": (">=", 1.3),
    "moe_vs_torchtitan_bf16": (">=", 1.3),
    "moe_vs_dense_fp32": ("<=", 1.1),
    "moe_vs_dense_bf16": ("<=", 1.3),
    "loss_memory_ratio": ("<=", 0.35),
    "overhead_share": ("<=", 0.05),
}

Step = Callable[[], object]
Peer = Callable[[Model], tuple[nn.Module, LossOf]]


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side (default 7)")
    parser.add_argument("--only", nargs="*", choices=sorted(GOALS), help="measure only these")


@command(
    "python -m launch.experiments.bench",
    __doc__,
    add_arguments,
    json="write the figures and the raw medians as JSON",
)
def main(options: Namespace) -> Figures:
    """Runs the benchmark and prints its table."""
    wanted = set(options.only or GOALS)
    raw: dict[str, float] = {}
    figures: dict[str, float] = {}
    if "loss_memory_ratio" in wanted:  # First: its child processes inherit a small parent.
        figures |= loss_memory(raw)
    if any(key.startswith("vs_") for key in wanted):
        figures |= training_steps(wanted, options.rounds, raw)
    if any(key.startswith("moe_vs") for key in wanted):
        figures |= moe_layer(options.rounds * 3, raw)
    if "overhead_share" in wanted:
        figures |= step_split(raw)
    figures = {key: figures[key] for key in GOALS if key in figures and key in wanted}
    print(table(figures, raw))
    return Figures({**figures, "raw_medians": raw, "machine": machine()})


def training_steps(wanted: set[str], rounds: int, raw: dict[str, float]) -> dict[str, float]:
    """Measures full training steps: forward, losses, backward, clipping, AdamW."""
    ids_BS = torch.randint(0, BENCH_MODEL.vocab_size, (SEQUENCES, TOKENS))
    figures = {}
    bf16 = supports_bf16("cpu")
    pairs: list[tuple[str, Peer, bool]] = [
        ("vs_hf_fp32", hugging_face_dbrx, False),
        ("vs_hf_bf16", hugging_face_dbrx, True),
        ("vs_hf_mixtral_fp32", hugging_face_mixtral, False),
        ("vs_hf_mixtral_bf16", hugging_face_mixtral, True),
        ("vs_llmfoundry", llm_foundry_mpt, False),
    ]
    major = version("transformers").partition(".")[0]
    other: dict[Peer, str] = {hugging_face_mixtral: "5", llm_foundry_mpt: "4"}
    for key, build_peer, in_bf16 in pairs:
        if key not in wanted or (in_bf16 and not bf16):
            continue
        if other.get(build_peer, major) != major:
            print(f"{key} is left out: it needs transformers {other[build_peer]}, on the other stack")
            continue
        sides = [_step(*build(BENCH_MODEL), ids_BS, in_bf16) for build in (_ours, build_peer)]
        try:
            sides[1]()
        except RuntimeError as error:  # of transformers 5.17 DBRX under autocast
            print(f"{key} is left out: the other side fails: {error}")
            continue
        ours, peer = alternate(key, sides, rounds)
        tokens = ids_BS.numel()
        raw |= {
            f"{key}/ours_tokens_per_second": tokens / ours,
            f"{key}/peer_tokens_per_second": tokens / peer,
        }
        figures[key] = peer / ours
        flops = tokens * flops_per_token_training(BENCH_MODEL, TOKENS).total / ours
        peak = measured_peak_flops("cpu", torch.bfloat16 if in_bf16 else torch.float32)
        raw[f"{key}/ours_share_of_peak"] = flops / peak
        del sides
        gc.collect()
    return figures


def moe_layer(rounds: int, raw: dict[str, float]) -> dict[str, float]:
    """Measures one MoE layer, forward and backward, against torchtitan's and a dense GLU of equal FLOPs."""
    moe = BENCH_MODEL.moe
    assert moe is not None
    figures: dict[str, float] = {}
    peer = _torchtitan_layer()
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name in ("fp32", "bf16") if supports_bf16("cpu") else ("fp32",):
        precision = precisions[name]
        dense = _DenseGlu(BENCH_MODEL.d_model, moe.top_k * BENCH_MODEL.ffn_hidden_size)
        sides = {
            "dense": _layer_step(dense, precision),
            "balanced": _layer_step(_moe_layer(), precision),
            "skewed": _layer_step(_moe_layer(), precision, skewed=True),
        }
        if peer is not None:
            sides["torchtitan"] = _layer_step(peer, precision)
        with experts_in_fp32(precision is torch.float32):
            medians = alternate(f"MoE layer, {name}", list(sides.values()), rounds)
        seconds = dict(zip(sides, medians, strict=True))
        raw |= {f"layer_{name}/{side}_ms": median * 1e3 for side, median in seconds.items()}
        raw[f"layer_{name}/skewed_vs_dense"] = seconds["skewed"] / seconds["dense"]
        figures[f"moe_vs_dense_{name}"] = seconds["balanced"] / seconds["dense"]
        if peer is not None:
            figures[f"moe_vs_torchtitan_{name}"] = seconds["torchtitan"] / seconds["balanced"]
    return figures


def step_split(raw: dict[str, float]) -> dict[str, float]:
    """Breaks down the time of a step in the real trainer, on the smoke run's shards."""
    from train.recipe.reading import load_recipe
    from train.recipe.topology import Topology
    from train.run import run

    with tempfile.TemporaryDirectory() as folder:
        shape = {
            "d_model": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_hidden_size": 448,
        }  # fmt: skip
        recipe = load_recipe(
            Path(__file__).resolve().parents[3] / "yamls/smoke.yaml",
            [
                *(f"model.{key}={value}" for key, value in shape.items()),
                f"runs_dir={folder}",
                "name=bench",
                "training.global_batch_sequences=8",
                "training.duration_tokens=81920",
                "schedule.warmup_tokens=8192",
                "tracking.mlflow=false",
            ],
        )
        run(recipe, Topology())
        steps = read_steps(Path(folder) / "bench" / METRICS_FILE)[4:]
    parts = {
        part: statistics.median(step[f"time/{part}"] for step in steps)
        for part in ("step", "loader", "forward", "backward", "optimizer", "other")
    }
    raw |= {f"time/{part}_ms": seconds * 1e3 for part, seconds in parts.items()}
    return {"overhead_share": (parts["loader"] + parts["other"]) / parts["step"]}


def alternate(name: str, steps: list[Step], rounds: int, warmup: int = 2) -> list[float]:
    """Median seconds of each step, run alternately."""
    seconds: list[list[float]] = [[] for _ in steps]
    for round_number in tqdm(range(warmup + rounds), desc=name, leave=False):
        for place, step in enumerate(steps):
            begin = time.perf_counter()
            step()
            if round_number >= warmup:
                seconds[place].append(time.perf_counter() - begin)
    return [statistics.median(times) for times in seconds]


def table(figures: dict[str, float], raw: dict[str, float]) -> str:
    """Formats the figures with their goals, the raw medians, and the machine."""
    rows = []
    for key, value in figures.items():
        sign, goal = GOALS[key]
        reached = value >= goal if sign == ">=" else value <= goal
        rows.append((key, f"{value:.3f}", f"{sign} {goal}", "" if reached else "NOT REACHED"))
    medians = [(key, f"{value:,.2f}") for key, value in raw.items()]
    tables = [
        text_table(("figure", "measured", "goal", ""), rows, "<><<"),
        "",
        text_table((), medians, "<>"),
        "",
    ]
    return "\n".join([*tables, *(f"{key}: {value}" for key, value in machine().items())])


def machine() -> dict[str, str]:
    """Hardware, commit and date, without which figures mean nothing."""
    peaks = {
        str(dtype).removeprefix("torch."): f"{measured_peak_flops('cpu', dtype) / 1e9:.0f} GFLOP/s"
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {
        "hardware": f"{describe_hardware('cpu')}, {torch.get_num_threads()} threads",
        "matrix-product peak": ", ".join(f"{name} {peak}" for name, peak in peaks.items()),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
    }


def _ours(cfg: Model) -> tuple[nn.Module, LossOf]:
    decoder = Decoder(cfg)
    initialize(decoder, cfg, 17)
    assert cfg.moe is not None
    weight = cfg.moe.balance_loss_weight

    def loss_of(ids_BS: Tensor) -> Tensor:
        targets_BS = torch.nn.functional.pad(ids_BS[:, 1:], (0, 1), value=-100)
        out = decoder(ids_BS, None, targets_BS)
        return out.loss_sum / out.target_tokens + weight * out.balance_loss

    return decoder.train(), loss_of


def _step(model: nn.Module, loss_of: LossOf, ids_BS: Tensor, in_bf16: bool) -> Step:
    """Builds a full optimizer step; both sides have the same optimizer and clipping."""
    optimizer = build_optimizer(model, Optimizer(learning_rate=1e-4))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = loss_of(ids_BS)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()

    return step


class _DenseGlu(nn.Module):
    """A dense layer with the FLOPs of a token's K experts."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, hidden, bias=False)
        self.v1 = nn.Linear(d_model, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x_BSD)) * self.v1(x_BSD))


def _moe_layer() -> nn.Module:
    """Builds an MoE layer whose router reads its scores off the input."""
    assert BENCH_MODEL.moe is not None
    layer = MoE(BENCH_MODEL.d_model, BENCH_MODEL.ffn_hidden_size, BENCH_MODEL.moe)
    _set_router(layer, layer.router.layer.weight)
    return layer


def _torchtitan_layer() -> nn.Module | None:
    """Builds torchtitan's layer likewise; None, with a word, where it is not installed."""
    try:
        layer = torchtitan_moe(BENCH_MODEL)
    except ModuleNotFoundError as error:
        print(f"torchtitan is left out ({error}); to compare: pip install --no-deps {TORCHTITAN}")
        return None
    _set_router(layer, layer.get_parameter("router.gate.weight"))
    return layer


def _set_router(layer: nn.Module, router_ED: Tensor) -> None:
    """Draws a layer's weights; the first E features of an input say which experts a token wants."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.02)
        router_ED.copy_(torch.eye(*router_ED.shape))


def _layer_input(skewed: bool) -> Tensor:
    """Inputs [B, S, D] whose first E features are the router's logits."""
    assert BENCH_MODEL.moe is not None
    experts, top_k = BENCH_MODEL.moe.experts, BENCH_MODEL.moe.top_k
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(SEQUENCES * TOKENS, BENCH_MODEL.d_model, generator=generator)
    logits_TE = torch.rand(x_TD.shape[0], experts, generator=generator)
    if skewed:
        # Every token selects experts 0 and 1: they get 2 of its 4 choices.
        logits_TE[:, : top_k // 2] += 2.0
    x_TD[:, :experts] = logits_TE
    return x_TD.view(SEQUENCES, TOKENS, -1)


def _layer_step(layer: nn.Module, precision: torch.dtype, *, skewed: bool = False) -> Step:
    x_BSD = _layer_input(skewed).requires_grad_()
    gradient_BSD = torch.randn_like(x_BSD)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x_BSD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            out = layer(x_BSD)
        out_BSD = out[0] if isinstance(out, tuple) else out
        out_BSD.backward(gradient_BSD.to(out_BSD.dtype))

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
