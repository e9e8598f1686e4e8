"""Runs from command to report on GPUs of the stand-in: training, saves, evaluation, resume elsewhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_standin import standin
from train.hf.checkpoint_weights import CheckpointWeights
from train.record import metrics
from train.record.step_log import read_steps

pytestmark = pytest.mark.slow

COMPOSER = "import sys, train; from composer.cli.launcher import main; sys.exit(main())"
TINY = [
    *("yamls/smoke.yaml", "name=try", "on_existing=resume", "tracking.mlflow=false", "preflight.when=always"),
    *("data.corpus_bytes=400000", "data.sequence_tokens=128", "data.validation_sequences=8"),
    *("tokenizer.vocab_size=512", "model.vocab_size=512", "model.d_model=64", "model.n_layers=2"),
    *("model.n_heads=2", "model.n_kv_heads=1", "model.ffn_hidden_size=112", "schedule.warmup_tokens=1024"),
    *("training.duration_tokens=4096", "training.microbatch_sequences=2"),
    *("evaluation.interval_batches=4", "checkpoint.interval_batches=2"),
]


def run(folder: Path, ranks: int, *overrides: str) -> list[dict[str, dict[str, list[float]]]]:
    """Trains, or resumes, as `composer train/main.py` does; returns each rank's counts."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text(NVIDIA_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    env = standin.environment(ranks, OUTPUT=str(folder / "counts"))
    env |= {"PATH": f"{tools}:{env['PATH']}", "PYTHONPATH": str(standin.ROOT)}
    # Without a cache all memory is fresh, and what kernels would have computed is 0.
    env |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sys.executable, "-c", COMPOSER, "-n", str(ranks), "tests/cuda_standin/main.py", *TINY]
    command += [f"runs_dir={folder}", f"data.shards={folder}/shards", *overrides]
    done = subprocess.run(command, cwd=standin.ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "NO more copies in memory" not in done.stdout + done.stderr
    return [json.loads((folder / f"counts.{rank}").read_text()) for rank in range(ranks)]


NVIDIA_SMI = """#!/bin/sh
case "$1" in
nvlink) for link in 0 1; do echo "         Link $link: 26.562 GB/s"; done ;;
*) for gpu in 0 1; do echo "$gpu, 0, 1980 MHz, Not Active"; done ;;
esac
"""


def products(counts: dict[str, dict[str, list[float]]]) -> set[str]:
    """Returns the precisions of the products that a rank asked for."""
    return {name.split()[0] for name in counts["products"]}


def test_two_gpus_train_save_and_evaluate_and_one_resumes(tmp_path: Path) -> None:
    ranks = run(tmp_path, 2, "parallelism.expert=2", "checkpoint.memory_interval_batches=1")
    folder = tmp_path / "try"
    saved = folder / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["batch-00000002", "batch-00000004"]
    assert json.loads((folder / "summary.json").read_text())["batches"] == 4
    # The allocator is asked; the stand-in has no management library, and so no sensors.
    last = read_steps(folder / "metrics.jsonl")[-1]
    assert {metrics.GPU_MEMORY_PEAK, metrics.GPU_MEMORY_RESERVED, metrics.PROCESS_MEMORY} <= last.keys()
    for counts in ranks:
        # The router's product is fp32 and stays so, though Composer turns TF32 on.
        assert products(counts) == {"bf16", "fp32"}
        assert any(name.endswith("over 2") for name in counts["collectives"])
    before = CheckpointWeights(saved / "batch-00000002")

    shutil.rmtree(saved / "batch-00000004")
    (folder / "summary.json").unlink()
    (counts,) = run(tmp_path, 1)
    assert json.loads((folder / "summary.json").read_text())["batches"] == 4
    assert products(counts) == {"bf16", "fp32"}
    after = CheckpointWeights(saved / "batch-00000004")
    # An optimizer that is a kernel changes nothing: the weights of another layout are those that were saved.
    assert sorted(before.tensors) == sorted(after.tensors)
    for name in before.tensors:
        torch.testing.assert_close(after.read(name), before.read(name), rtol=0, atol=0)
