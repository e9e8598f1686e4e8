"""Import and export against a plain copy of the same files: `python -m launch.experiments.bench.hf`.

DBRX models with random bf16 weights, 0.2 and 1.7 GB, are made in a temporary folder. Copy, import and export
alternate, from the page cache to the disk: each ends when all its files are synced. A ratio is that of median
times. Peak memory is measured in a separate process, above its memory before the operation.
"""

import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from launch.experiments.bench.__main__ import machine
from launch.verify.forked_ranks import run_ranks
from train.checkpoint.files import Progress
from train.checkpoint.saver import CheckpointSaver
from train.hf.export import write_folder
from train.hf.import_hf import import_folder
from train.hf.safetensors_io import TensorInfo
from train.hf.weights import WeightSource, open_weights
from train.layout.mesh import build_mesh, build_sharded
from train.model.decoder import Decoder
from train.recipe import sizes
from train.recipe.reading import to_yaml
from train.recipe.schema import Data, Model, Moe, Optimizer, Precision, Recipe, Training
from train.recipe.topology import Topology
from train.record.command import Figures, command
from train.record.log import no_bars
from train.record.run_folder import CHECKPOINTS_FOLDER, RECIPE_FILE
from train.record.tables import markdown_table

WIDE = Model(
    d_model=768,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    ffn_hidden_size=1344,
    vocab_size=4096,
    max_sequence_tokens=512,
    clip_qkv=8.0,
    moe=Moe(experts=16, top_k=4),
)
LAYERS = (2, 17)
"""Layers of the two models, which differ in size by a factor of 8."""
FILES = 16
"""Number of files per model."""
RANKS = 2
"""Ranks that save the checkpoint; each writes its shards to a file."""
GOAL = 0.5
"""Minimum throughput, as a fraction of the copy's."""
MOST_TENSORS = 3.0
"""Maximum peak memory, as a multiple of the largest tensor."""

Work = Callable[[Path], object]
"""Writes into a folder that does not exist yet."""


@dataclass(frozen=True)
class Speed:
    """Throughput of an operation."""

    gigabytes: float
    operation: str
    gigabytes_per_second: float
    ratio: float
    """Throughput over that of copying the same files."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of an operation."""

    gigabytes: float
    operation: str
    peak_megabytes: float
    tensors: float
    """The same as a multiple of the largest tensor."""


class RandomWeights:
    """Tensors that are all views of the same noise."""

    def __init__(self, model: Model) -> None:
        self.tensors = {
            weight.name: TensorInfo(weight.name, torch.bfloat16, weight.shape)
            for weight in sizes.weights(model)
        }
        count = max(math.prod(info.shape) for info in self.tensors.values())
        self._noise = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows of a tensor."""
        info = self.tensors[name]
        shape = ((info.shape[0] if last is None else last) - first, *info.shape[1:])
        return self._noise[: torch.Size(shape).numel()].view(shape)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: a temporary folder")


@command("python -m launch.experiments.bench.hf", __doc__, add_arguments, json="write the figures")
def main(options: Namespace) -> Figures:
    """Runs the benchmark; status 1 if a goal is missed."""
    speeds: list[Speed] = []
    peaks: list[Peak] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as root:
        for layers in tqdm(LAYERS, desc="sizes"):
            folder = Path(root) / str(layers)
            operations = prepare(folder, replace(WIDE, n_layers=layers))
            peaks += peak_memory(folder, operations)
            speeds += throughput(folder, operations, options.rounds)
            shutil.rmtree(folder)
    print(table(speeds, peaks))
    figures = {"speeds": [asdict(s) for s in speeds], "peaks": [asdict(p) for p in peaks]}
    reached = all(s.ratio >= GOAL for s in speeds) and all(p.tensors < MOST_TENSORS for p in peaks)
    return Figures(figures | {"machine": machine()}, 0 if reached else 1)


def prepare(folder: Path, model: Model) -> dict[str, Work]:
    """Makes a model in each format; returns the operations on them, the copy first."""
    size = 2 * sizes.total_parameters(model)
    theirs, imported = folder / "hugging-face", folder / "imported"
    with no_bars():
        write_folder(WeightSource(folder, model, RandomWeights(model)), theirs, shard_bytes=size // FILES)
        import_folder(theirs, imported)
    run = folder / "run"
    run_ranks(RANKS, lambda topology: _save_checkpoint(run, model, topology))
    return {
        "copy": lambda out: shutil.copytree(theirs, out),
        "import": lambda out: import_folder(theirs, out, size / FILES / 1e9),
        "export": lambda out: write_folder(open_weights(imported), out),
        "export of a checkpoint": lambda out: write_folder(_without_recipe(run), out, None, size // FILES),
    }


def _save_checkpoint(run: Path, model: Model, topology: Topology) -> None:
    """Makes the folder of a run with one bf16 checkpoint, sharded over the ranks."""
    run.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        name="run",
        model=model,
        data=Data(shards="none", domains={"code": 1.0}, sequence_tokens=512),
        training=Training(duration_tokens=512, global_batch_sequences=1, microbatch_sequences=1),
        optimizer=Optimizer(learning_rate=1e-3),
    )
    (run / RECIPE_FILE).write_text(to_yaml(recipe))
    decoder = Decoder(model, device="meta").bfloat16()
    mesh = build_mesh(recipe.parallelism, topology.world_size, "cpu")
    build_sharded(decoder, mesh, Precision.fp32, recipe.seed)
    saver = CheckpointSaver(run / CHECKPOINTS_FOLDER, topology, keep_last=1)
    wrapped = torch.nn.ModuleDict({"decoder": decoder})
    saver.start(wrapped, torch.optim.SGD(decoder.parameters()), Progress(1, 1, 512, 1.0))
    saver.wait()


def _without_recipe(run: Path) -> WeightSource:
    """Opens a run's weights without its recipe, since this run has no tokenizer to export."""
    return replace(open_weights(run), recipe=None)


def throughput(folder: Path, operations: Mapping[str, Work], rounds: int) -> Iterator[Speed]:
    """Measures each operation's throughput and its ratio to the copy's."""
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    size = _bytes(folder / "hugging-face")
    for round_number in tqdm(range(rounds + 1), desc=f"{size / 1e9:.1f} GB", leave=False):
        for name, work in operations.items():
            elapsed = _timed(work, folder / "out")
            if round_number:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        yield Speed(size / 1e9, name, size / 1e9 / median, medians["copy"] / median)


def _timed(work: Work, out: Path) -> float:
    """Seconds until an operation's output is on the disk; the output is then removed."""
    # Otherwise this operation would pay for writing back the previous one's data.
    os.sync()
    begin = time.perf_counter()
    with no_bars():
        work(out)
    for file in out.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    elapsed = time.perf_counter() - begin
    shutil.rmtree(out)
    return elapsed


def peak_memory(folder: Path, operations: Mapping[str, Work]) -> Iterator[Peak]:
    """Measures the peak memory of each operation except the copy, in a separate forked process."""
    theirs = folder / "hugging-face"
    largest = max(info.bytes for info in open_weights(theirs).weights.tensors.values())
    for name, work in operations.items():
        if name == "copy":
            continue
        (peak,) = run_ranks(1, _measuring(work, folder / "out"))
        shutil.rmtree(folder / "out")
        yield Peak(_bytes(theirs) / 1e9, name, peak / 1e6, peak / largest)


def _measuring(work: Work, out: Path) -> Callable[[Topology], int]:
    return lambda topology: _peak_of(work, out)


def _peak_of(work: Work, out: Path) -> int:
    """Peak bytes above those held before; resets the kernel's high-water mark first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    with no_bars():
        work(out)
    return _memory("VmHWM") - before


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def table(speeds: list[Speed], peaks: list[Peak]) -> str:
    """Formats throughput and memory with their goals, and the machine."""
    speed_rows = []
    for one in speeds:
        ratio = f"{one.ratio:.2f}" if one.ratio >= GOAL else f"{one.ratio:.2f} (goal {GOAL})"
        speed_rows.append(
            (f"{one.gigabytes:.2f} GB", one.operation, f"{one.gigabytes_per_second:.2f}", ratio)
        )
    peak_rows = [
        (f"{one.gigabytes:.2f} GB", one.operation, f"{one.peak_megabytes:.0f} MB", f"{one.tensors:.2f}")
        for one in peaks
    ]
    tables = [
        markdown_table(("model", "operation", "GB/s", "of the copy"), speed_rows, "><>>"),
        markdown_table(("model", "operation", "peak memory", "largest tensors"), peak_rows, "><>>"),
        "\n".join(f"{key}: {value}" for key, value in machine().items()),
    ]
    return "\n\n".join(tables)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
