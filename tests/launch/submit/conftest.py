"""Fixtures for jobs that really train: the smoke recipe at a size that two cores train in a minute."""

from pathlib import Path

import pytest

from launch.submit.job import Device, Job
from train.record.metrics import LOSS
from train.record.run_folder import METRICS_FILE
from train.record.step_log import STEP, read_steps

ROOT = Path(__file__).resolve().parents[3]
BATCH_TOKENS = 4 * 128


class RealRuns:
    """Jobs of two nodes with one CPU rank each and a spare node, and their results.

    Args:
        folder: folder of the runs.
        batches: batches that each run trains.
    """

    def __init__(self, folder: Path, batches: int = 80) -> None:
        self.folder, self.batches = folder, batches

    def job(self, name: str) -> Job:
        """Returns a job named after its run."""
        small = {
            "name": name,
            "runs_dir": self.folder,
            "model.d_model": 64,
            "model.n_layers": 2,
            "model.ffn_hidden_size": 112,
            "model.vocab_size": 512,
            "model.max_sequence_tokens": 128,
            "tokenizer.vocab_size": 512,
            "data.shards": ROOT / ".cache/real-run-shards",
            "data.corpus_bytes": 2_000_000,
            "data.sequence_tokens": 128,
            "data.validation_sequences": 4,
            "training.duration_tokens": self.batches * BATCH_TOKENS,
            "training.global_batch_sequences": 4,
            "training.microbatch_sequences": 2,
            "schedule.warmup_tokens": 0,
            "evaluation.interval_batches": "null",
            "checkpoint.interval_batches": 4,
            "tracking.mlflow": "false",
            "on_existing": "resume",
        }
        return Job(
            "yamls/smoke.yaml",
            overrides=tuple(f"{key}={value}" for key, value in small.items()),
            name=name,
            nodes=2,
            spare_nodes=1,
            gpus_per_node=1,
            device=Device.cpu,
            hours=0.5,
            interface="lo",
            workdir=str(ROOT),
        )

    def losses(self, name: str) -> dict[int, float]:
        """Returns losses by batch, as far as the run has come."""
        file = self.folder / name / METRICS_FILE
        return {row[STEP]: row[LOSS] for row in read_steps(file) if LOSS in row} if file.is_file() else {}


@pytest.fixture
def real_runs(tmp_path: Path) -> RealRuns:
    """Real runs in a folder of this test."""
    return RealRuns(tmp_path)
