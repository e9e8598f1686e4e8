"""A corpus of one's own: written, trained, stopped, resumed, edited, forked, evaluated, exported."""

import gzip
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.recipe.exit_status import PREEMPTED_STATUS
from train.record.changes import read_changes
from train.record.step_log import read_steps

pytestmark = pytest.mark.slow

SMOKE = Path(__file__).resolve().parents[2] / "yamls/smoke.yaml"
WORDS = ("the", "router", "sends", "every", "token", "to", "four", "experts", "and", "adds", "their", "words")
FEW = {"validation_share": 0.1, "near_duplicates": None}


def _texts(kind: str, documents: int = 120) -> Iterator[str]:
    draw = random.Random(kind)
    for n in range(documents):
        words = " ".join(draw.choices(WORDS, k=60))
        yield f"def {kind}_{n}(x):\n    return '{words}'\n" if kind == "code" else f"{kind} {n}. {words}."


def _corpus(folder: Path) -> list[dict[str, str]]:
    """Writes three domains in three formats, and returns their sources."""
    import pyarrow
    from pyarrow import parquet

    with gzip.open(folder / "web.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"page": {"body": text}}) + "\n" for text in _texts("web"))
    parquet.write_table(pyarrow.table({"content": list(_texts("code"))}), folder / "code.parquet")
    (folder / "notes").mkdir()
    for n, text in enumerate(_texts("notes")):
        (folder / f"notes/{n}.txt").write_text(text)
    said = {"version": "1", "origin": "-", "licence": "-"}
    sources = (
        {"domain": "web", "kind": "jsonl", "path": str(folder / "web.jsonl.gz"), "text_column": "page.body"},
        {"domain": "code", "kind": "parquet", "path": str(folder / "code.parquet"), "text_column": "content"},
        {"domain": "notes", "kind": "text", "path": str(folder / "notes")},
    )
    return [{**source, "dataset": source["domain"], **said} for source in sources]


def _recipe(folder: Path) -> dict[str, Any]:
    """Two phases over the three domains."""
    return {
        "extends": str(SMOKE),
        "name": "mine",
        "runs_dir": str(folder),
        "on_existing": "resume",
        "tokenizer": {"kind": "bpe", "vocab_size": 400},
        "model": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "ffn_hidden_size": 24},
        "data": {
            "shards": str(folder / "shards"),
            "corpus": None,
            "sources": _corpus(folder),
            "preparation": FEW,
            "sequence_tokens": 64,
            "validation_sequences": 2,
            "domains": {},
            "phases": [
                {"tokens": 4096, "weights": {"web": 0.5, "code": 0.3, "notes": 0.2}},
                {"tokens": 2048, "weights": {"web": 0.2, "code": 0.4, "notes": 0.4}, "sequence_tokens": 128},
            ],
        },
        "training": {"duration_tokens": 6144, "microbatch_sequences": 4, "precision": "fp32"},
        "schedule": {"warmup_tokens": 1024},
        "evaluation": {"interval_batches": 6},
        "checkpoint": {"interval_batches": 4},
        "tracking": {"mlflow": False},
    }


def _stop_at(batch: int, words: list[str]) -> int:
    """Trains in a process of its own, which is asked to end in a batch; returns its exit status."""
    from launch.verify.forked_ranks import Ranks
    from launch.verify.tiny_runs import import_for_runs

    import_for_runs()

    def work(_topology: object) -> None:
        from train.main import main
        from train.step.step import TrainingStep

        begin = TrainingStep.batch_start

        def asked(self: TrainingStep, state: object, logger: object) -> None:
            begin(self, state, logger)
            if state.timestamp.batch.value + 1 == batch:
                os.kill(os.getpid(), signal.SIGTERM)

        TrainingStep.batch_start = asked
        raise SystemExit(main(words))

    with Ranks(1, work, Path(words[0]).with_suffix(".log")) as processes:
        (code,) = processes.exit_codes(240)
    return code


def test_a_corpus_of_three_formats_from_its_files_to_an_export(tmp_path: Path) -> None:
    from data.audit.__main__ import main as audit
    from data.write_shards import main as write_shards
    from train.evaluate.__main__ import main as evaluate
    from train.hf.__main__ import main as hf
    from train.main import main as train
    from train.report.__main__ import main as report

    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(_recipe(tmp_path)))
    run = tmp_path / "mine"

    assert write_shards([str(file)]) == 0
    assert _stop_at(6, [str(file)]) == PREEMPTED_STATUS
    assert len(read_steps(run / "metrics.jsonl")) == 6
    # Edited while it is stopped: a longer second phase, evaluated more often.
    longer = ("data.phases[1].tokens=4096", "training.duration_tokens=8192", "evaluation.interval_batches=4")
    assert train([str(file), *longer]) == 0
    steps = read_steps(run / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 17))
    assert [step["phase"] for step in steps] == [0] * 8 + [1] * 8
    assert "training.duration_tokens" in {key.key for change in read_changes(run) for key in change.keys}
    assert audit([str(run)]) == 0

    fork = [f"start.run={run}", "start.batch=12", "name=forked", "optimizer.learning_rate=0.001"]
    assert train([str(file), *longer, *fork]) == 0
    forked = read_steps(tmp_path / "forked/metrics.jsonl")
    assert len(forked) == 16 and forked[11]["loss/train"] == steps[11]["loss/train"]
    assert forked[15]["loss/train"] != steps[15]["loss/train"]

    scores = tmp_path / "scores.json"
    assert evaluate([str(tmp_path / "forked"), "--bits-per-byte", "--json", str(scores)]) == 0
    assert all(domain in scores.read_text() for domain in ("web", "code", "notes"))
    assert hf(["export", str(tmp_path / "forked"), str(tmp_path / "out")]) == 0
    assert report([str(tmp_path / "forked")]) == 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    said = model.generate(**tokenizer("the router", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert said.shape[1] > 3
