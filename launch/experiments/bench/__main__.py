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
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from launch.experiments.bench.loss import loss_memory
from launch.experiments.bench.peers import LossOf, hugging_face_dbrx, llm_foundry_mpt
from train.layout.device import describe_hardware, measured_peak_flops, supports_bf16
from train.layout.optim import build_optimizer, clip_gradients
from train.model.decoder import Decoder
from train.model.init import initialize
from train.model.moe import MoE
from train.recipe.schema import Model, Moe, Optimizer
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
    "vs_hf_bf16": (">=", 1.4),
    "vs_hf_fp32": (">=", 1.3),
    "vs_llmfoundry": (">=", 1.6),
    "moe_vs_dense_balanced": ("<=", 1.15),
    "moe_vs_dense_skewed": ("<=", 1.3),
    "loss_memory_ratio": ("<=", 0.35),
    "overhead_share": ("<=", 0.05),
}

Step = Callable[[], object]


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
    if wanted & {"vs_hf_fp32", "vs_hf_bf16", "vs_llmfoundry"}:
        figures |= training_steps(wanted, options.rounds, raw)
    if wanted & {"moe_vs_dense_balanced", "moe_vs_dense_skewed"}:
        figures |= moe_layer(options.rounds * 3, raw)
    if "overhead_share" in wanted:
        figures |= step_split(raw)
    figures = {key: figures[key] for key in GOALS if key in figures}
    print(table(figures, raw))
    return Figures({**figures, "raw_medians": raw, "machine": machine()})


def training_steps(wanted: set[str], rounds: int, raw: dict[str, float]) -> dict[str, float]:
    """Measures full training steps: forward, losses, backward, clipping, AdamW."""
    ids_BS = torch.randint(0, BENCH_MODEL.vocab_size, (SEQUENCES, TOKENS))
    figures = {}
    bf16 = supports_bf16("cpu")
    pairs: list[tuple[str, Callable[[Model], tuple[nn.Module, LossOf]], bool]] = [
        ("vs_hf_fp32", hugging_face_dbrx, False),
        ("vs_hf_bf16", hugging_face_dbrx, True),
        ("vs_llmfoundry", llm_foundry_mpt, False),
    ]
    for key, build_peer, in_bf16 in pairs:
        if key not in wanted or (in_bf16 and not bf16):
            continue
        sides = [_step(*build(BENCH_MODEL), ids_BS, in_bf16) for build in (_ours, build_peer)]
        ours, peer = alternate(key, sides, rounds)
        tokens = ids_BS.numel()
        raw |= {
            f"{key}/ours_tokens_per_second": tokens / ours,
            f"{key}/peer_tokens_per_second": tokens / peer,
        }
        figures[key] = peer / ours
        del sides
        gc.collect()
    return figures


def moe_layer(rounds: int, raw: dict[str, float]) -> dict[str, float]:
    """Measures one MoE layer, forward and backward, against a dense GLU of the same active FLOPs."""
    moe = BENCH_MODEL.moe
    assert moe is not None
    figures: dict[str, float] = {}
    for precision in (torch.float32, torch.bfloat16) if supports_bf16("cpu") else (torch.float32,):
        name = str(precision).removeprefix("torch.")
        dense = _layer_step(
            _DenseGlu(BENCH_MODEL.d_model, moe.top_k * BENCH_MODEL.ffn_hidden_size), precision
        )
        balanced = _layer_step(_moe_layer(skewed=False), precision)
        skewed = _layer_step(_moe_layer(skewed=True), precision)
        seconds = alternate(f"MoE layer, {name}", [dense, balanced, skewed], rounds)
        raw |= dict(
            zip(
                (f"{side}_{name}_ms" for side in ("dense", "balanced", "skewed")),
                [s * 1e3 for s in seconds],
                strict=True,
            )
        )
        for key, at in (("moe_vs_dense_balanced", 1), ("moe_vs_dense_skewed", 2)):
            raw[f"{key}/{name}"] = seconds[at] / seconds[0]
            figures[key] = max(figures.get(key, 0.0), raw[f"{key}/{name}"])
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


def _moe_layer(skewed: bool) -> nn.Module:
    """Builds an MoE layer whose router spreads tokens evenly, or sends half of all choices to two experts."""
    assert BENCH_MODEL.moe is not None
    experts, width = BENCH_MODEL.moe.experts, BENCH_MODEL.d_model
    layer = MoE(width, BENCH_MODEL.ffn_hidden_size, BENCH_MODEL.moe)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.02)
        # The inputs' first E features say which experts a token wants (see _layer_input).
        layer.router.layer.weight.zero_()
        layer.router.layer.weight[:, :experts] = torch.eye(experts)
    layer.skewed = skewed
    return layer


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


def _layer_step(layer: nn.Module, precision: torch.dtype) -> Step:
    x_BSD = _layer_input(bool(getattr(layer, "skewed", False))).requires_grad_()
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
