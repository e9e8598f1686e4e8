"""A suite in the training loop: its records, and agreement with the evaluation of the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.evaluate.task_files import check_suite
from train.main import main as train
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology
from train.record.step_log import read_steps

pytestmark = pytest.mark.slow

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"


def _overrides(tmp_path: Path, tasks: Any) -> list[str]:
    return [
        f"runs_dir={tmp_path}",
        "name=looped",
        f"data.shards={tmp_path / 'shards'}",
        "data.corpus_bytes=400000",
        "data.sequence_tokens=64",
        "data.validation_sequences=8",
        "tokenizer.vocab_size=512",
        "model.vocab_size=512",
        "model.d_model=32",
        "model.n_layers=2",
        "model.ffn_hidden_size=24",
        "training.duration_tokens=3072",
        "training.precision=fp32",
        "schedule.warmup_tokens=1024",
        "evaluation.interval_batches=3",
        f"evaluation.suite={tasks.suite}",
        f"evaluation.suite_data={tasks.data}",
        "evaluation.suite_questions=5",
        "evaluation.suite_interval_batches=3",
        "tracking.mlflow=false",
    ]


def test_scores_in_the_loop_are_those_of_the_checkpoint(tmp_path: Path, small_tasks: Any) -> None:
    from train.evaluate.__main__ import main

    assert train([str(SMOKE), *_overrides(tmp_path, small_tasks)]) == 0
    folder = tmp_path / "looped"
    records = json.loads((folder / "evaluation.json").read_text())
    assert [record["batch"] for record in records] == [3, 6]
    steps = {step["step"]: step for step in read_steps(folder / "metrics.jsonl")}
    assert [n for n, step in steps.items() if "evaluation/average" in step] == [3, 6]
    for record in records:
        for task, score in record["scores"]["tasks"].items():
            assert steps[record["batch"]][f"evaluation/task/{task}"] == score
    common = ["--suite", str(small_tasks.suite), "--data", str(small_tasks.data), "--questions", "5"]
    extra = ["--retrieval", "--lengths", "128", "--depths", "0,1", "--trials", "2", "--bits-per-byte"]
    assert main([str(folder), *common, *extra, "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())[0]
    assert again["suite"]["scores"] == records[-1]["scores"]
    last = read_steps(folder / "metrics.jsonl")[-1]
    for domain, found in again["bits_per_byte"]["domains"].items():
        assert found["loss"] == pytest.approx(last[f"loss/validation/{domain}"], abs=1e-5)
        assert found["bits_per_byte"] == pytest.approx(last[f"bits_per_byte/validation/{domain}"], abs=1e-5)
    kinds = [(r["kind"], r["batch"]) for r in json.loads((folder / "evaluation.json").read_text())]
    assert kinds == [("suite", 3), ("suite", 6), ("retrieval", 6), ("bits_per_byte", 6)]
    page = (folder / "report.html").read_text()
    assert "arc_easy" in page and "Key-value retrieval by depth and length" in page


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("evaluation.suite_interval_batches=4", "evaluation.suite_interval_batches: 4 is not a multiple"),
        ("evaluation.suite=null", "evaluation.suite_data: is set without a suite"),
        ("evaluation.suite_data=nowhere", "evaluation.suite_tasks: nowhere lacks arc_easy"),
        ("evaluation.suite=none.yaml", "none.yaml: no such suite"),
        ("evaluation.suite_tasks=[essay]", "has no task 'essay'"),
    ],
)
def test_mistakes_are_named_before_torch(
    tmp_path: Path, small_tasks: Any, override: str, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        recipe = load_recipe(SMOKE, [*_overrides(tmp_path, small_tasks), override])
        validate(recipe, Topology(), str(SMOKE))
        check_suite(recipe, str(SMOKE))
