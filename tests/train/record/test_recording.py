"""The recording callbacks in a real Composer run of a toy model: record, clock, console, resumption."""

import io
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from train.record import metrics
from train.record.console import Console
from train.record.expert_load import ExpertLoad
from train.record.run_tracker import RunTracker
from train.record.step_log import SHARES, read_steps
from train.record.throughput import Throughput

if TYPE_CHECKING:
    from composer import DataSpec

BATCH, TOKENS, BATCHES = 4, 8, 6


def _spec(seed: int, batches: int) -> "DataSpec":
    from composer import DataSpec
    from torch.utils.data import DataLoader

    data = torch.randn(BATCH * batches, TOKENS, generator=torch.Generator().manual_seed(seed))
    return DataSpec(
        DataLoader(data, batch_size=BATCH),
        get_num_samples_in_batch=len,
        get_num_tokens_in_batch=Tensor.numel,
    )


def train_toy(run_dir: Path, *, batches: int, resume_batch: int = 0, fit: bool = True) -> tuple[str, dict]:
    """Trains a toy model with every callback; returns the console output and the tracker's last values."""
    from composer import Evaluator, Time, Trainer
    from composer.models import ComposerModel
    from torchmetrics import MeanMetric

    class Toy(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(TOKENS, TOKENS)

        def forward(self, batch: Tensor) -> Tensor:
            return self.line(batch)

        def loss(self, outputs: Tensor, batch: Tensor) -> dict[str, Tensor]:
            language = (outputs - 1).square().mean()
            return {"total": language + 0.5, "language": language, "balance": torch.tensor(1.25)}

        def eval_forward(self, batch: Tensor, outputs: Tensor | None = None) -> Tensor:
            return self(batch)

        def get_metrics(self, is_train: bool) -> dict[str, MeanMetric]:
            return {} if is_train else {"token_loss": MeanMetric()}

        def update_metric(self, batch: Tensor, outputs: Tensor, metric: MeanMetric) -> None:
            metric.update(torch.tensor(2 * math.log(2)))

    shown = io.StringIO()
    tracker = RunTracker(run_dir, bytes_per_token={"code": 4.0})
    model = Toy()
    every = {"metric_names": ["token_loss"], "eval_interval": Time.from_batch(4)}
    validation = Evaluator(label="validation/code", dataloader=_spec(2, batches), **every)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.125),
        max_duration=Time.from_batch(batches),
        train_dataloader=_spec(1, batches),
        eval_dataloader=[validation],
        callbacks=[
            ExpertLoad(run_dir, batches, lambda: torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])),
            Throughput(lambda batch: 100.0 + batch, peak_flops=1e6, devices=2),
        ],
        loggers=[tracker, Console(batches, 2)],
        progress_bar=False,
        device="cpu",
        device_train_microbatch_size=2,
        spin_dataloaders=False,
    )
    trainer.state.timestamp = trainer.state.timestamp.copy(
        batch=resume_batch, token=resume_batch * BATCH * TOKENS, sample=resume_batch * BATCH
    )
    with redirect_stdout(shown):
        if fit:
            trainer.fit()
        else:
            trainer.eval()
        trainer.close()
    return shown.getvalue(), tracker.latest


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("toy")
    shown, _ = train_toy(run_dir, batches=BATCHES)
    return run_dir, shown


def test_every_step_is_one_line_with_every_figure(toy_run: tuple[Path, str]) -> None:
    lines = read_steps(toy_run[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, BATCHES + 1))
    assert [line["tokens"] for line in lines] == [n * BATCH * TOKENS for n in range(1, BATCHES + 1)]
    for line in lines:
        assert line[metrics.LOSS_TOTAL] == pytest.approx(line[metrics.LOSS] + 0.5)
        assert line[metrics.LOSS_BALANCE] == pytest.approx(1.25)
        assert all(metrics.find_metric(key) for key in line.keys() - {"step", "tokens", "time"})


def test_validation_joins_the_line_of_its_batch(toy_run: tuple[Path, str]) -> None:
    lines = {line["step"]: line for line in read_steps(toy_run[0] / "metrics.jsonl")}
    key = metrics.validation_loss("code")
    # Batch 4 by the interval, the last one at the end of the run.
    assert [step for step, line in lines.items() if key in line] == [4, BATCHES]
    assert lines[4][key] == pytest.approx(2 * math.log(2))
    assert lines[4][metrics.bits_per_byte("code")] == pytest.approx(2 / 4)


def test_step_time_is_split_without_remainder(toy_run: tuple[Path, str]) -> None:
    for line in read_steps(toy_run[0] / "metrics.jsonl"):
        parts = [line[part] for part in metrics.STEP_PARTS]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(line[metrics.TIME_STEP])
        rate = BATCH * TOKENS / line[metrics.TIME_STEP]
        assert line[metrics.TOKENS_PER_SECOND] == pytest.approx(rate)
        assert line[metrics.FLOP_UTILISATION] == pytest.approx(rate * (100 + line["step"] - 1) / 2e6)


def test_evaluation_time_is_outside_the_step(toy_run: tuple[Path, str]) -> None:
    lines = {line["step"]: line for line in read_steps(toy_run[0] / "metrics.jsonl")}
    assert lines[5][metrics.TIME_EVALUATION] > 0
    assert lines[4][metrics.TIME_EVALUATION] == 0


def test_expert_load_is_logged_and_kept(toy_run: tuple[Path, str]) -> None:
    line = read_steps(toy_run[0] / "metrics.jsonl")[-1]
    assert line["experts/0/busiest"] == 0.75
    assert line["experts/0/dead"] == 2
    assert line["experts/1/entropy"] == pytest.approx(1)
    kept = read_steps(toy_run[0] / "expert_load.jsonl")
    assert len(kept) == BATCHES
    assert kept[0][SHARES] == [[0.75, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25]]


def test_console_shows_first_interval_and_last(toy_run: tuple[Path, str]) -> None:
    lines = toy_run[1].splitlines()
    assert [line.split("  ")[0] for line in lines if "validation" not in line] == [
        "batch 1/6",
        "batch 2/6",
        "batch 4/6",
        "batch 6/6",
    ]
    assert [line for line in lines if "validation" in line] == [
        "batch 4/6  validation loss  code 1.386",
        "batch 6/6  validation loss  code 1.386",
    ]
    assert "left" in lines[0] and lines[-2].endswith("done")


def test_resumption_leaves_no_step_twice(tmp_path: Path) -> None:
    train_toy(tmp_path, batches=4)
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 5, "loss/tr')
    before = read_steps(tmp_path / "metrics.jsonl")
    train_toy(tmp_path, batches=6, resume_batch=2)
    after = read_steps(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert after[:2] == before[:2]
    assert after[2]["time"] > before[3]["time"]
    assert [line["step"] for line in read_steps(tmp_path / "expert_load.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_evaluation_alone_joins_the_last_line(tmp_path: Path) -> None:
    train_toy(tmp_path, batches=3)
    before = read_steps(tmp_path / "metrics.jsonl")
    shown, latest = train_toy(tmp_path, batches=3, resume_batch=3, fit=False)
    after = read_steps(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in after] == [1, 2, 3]
    assert after[2][metrics.LOSS] == before[2][metrics.LOSS]
    assert latest[metrics.validation_loss("code")] == pytest.approx(2 * math.log(2))
    assert shown == "batch 3/3  validation loss  code 1.386\n"
