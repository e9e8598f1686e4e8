"""The six tasks of the Open LLM Leaderboard through lm-eval, on questions in each dataset's own format."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from train.recipe.reading import load_recipe
from train.recipe.schema import Model, Moe, Recipe, Tokenizer, TokenizerKind

if TYPE_CHECKING:
    from train.model.decoder import Decoder

pytestmark = pytest.mark.slow

YAMLS = Path(__file__).parents[3] / "yamls"
LEADERBOARD = YAMLS / "suites/open-llm-leaderboard.yaml"
ROWS = 30
"""Of a split: more than the 25 shots of ARC and the question itself."""


def _write(folder: Path, rows: Iterable[Mapping[str, Any]], *splits: str) -> None:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in splits:
        (folder / f"{split}.jsonl").write_text(lines)


def _hub(root: Path) -> Path:
    """Datasets of the six tasks; names, configs, splits and columns are lm-eval's."""
    import lm_eval.tasks

    numbers, letters = range(ROWS), list("ABCD")
    choices = [
        ["one", "two", "three", "four"][n % 4 :] + ["one", "two", "three", "four"][: n % 4] for n in numbers
    ]
    _write(
        root / "allenai/ai2_arc/ARC-Challenge",
        (
            {"question": f"What is {n}?", "choices": {"text": choices[n], "label": letters}, "answerKey": "B"}
            for n in numbers
        ),
        "train", "validation", "test",
    )  # fmt: skip
    _write(
        root / "Rowan/hellaswag/default",
        (
            {"ind": n, "activity_label": "Counting", "ctx_a": f"She says {n}.", "ctx_b": "then she",
             "endings": choices[n], "label": str(n % 4)}
            for n in numbers
        ),
        "train", "validation",
    )  # fmt: skip
    _write(
        root / "truthfulqa/truthful_qa/multiple_choice",
        (
            {"question": f"Is {n} a number?",
             "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]},
             "mc2_targets": {"choices": ["Yes", "It is", "No"], "labels": [1, 1, 0]}}
            for n in numbers
        ),
        "validation",
    )  # fmt: skip
    _write(
        root / "allenai/winogrande/winogrande_xl",
        (
            {"sentence": f"Box {n} hid the bag because _ was large.", "option1": "the box",
             "option2": "the bag", "answer": str(n % 2 + 1)}
            for n in numbers
        ),
        "train", "validation",
    )  # fmt: skip
    _write(
        root / "openai/gsm8k/main",
        ({"question": f"What is {n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in numbers),
        "train", "test",
    )  # fmt: skip
    for file in (Path(lm_eval.tasks.__file__).parent / "mmlu/default").glob("mmlu_*.yaml"):
        if subject := yaml.safe_load(file.read_text()).get("dataset_name"):
            _write(
                root / "cais/mmlu" / subject,
                ({"question": f"What is {n}?", "choices": choices[n], "answer": n % 4} for n in range(6)),
                "dev", "test",
            )  # fmt: skip
    return root


def test_the_six_tasks_run_with_their_shots_and_show_their_metrics(
    small_tasks: Any, tmp_path: Path, make_run: Callable[[Recipe], "tuple[Path, Decoder]"]
) -> None:
    from train.evaluate.harness import headline, read_tasks, run_harness
    from train.hf.__main__ import main as hf

    recipe = load_recipe(YAMLS / "smoke.yaml")
    model = Model(
        d_model=32,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        ffn_hidden_size=40,
        vocab_size=400,
        max_sequence_tokens=2048,
        moe=Moe(experts=4, top_k=2),
    )
    run, _ = make_run(
        replace(
            recipe,
            model=model,
            data=replace(recipe.data, shards=str(small_tasks.shards)),
            tokenizer=Tokenizer(TokenizerKind.bpe, model.vocab_size),
        )
    )
    assert hf(["export", str(run), str(tmp_path / "hf")]) == 0
    tasks = read_tasks(str(LEADERBOARD))
    found = run_harness(tmp_path / "hf", tasks, data=_hub(tmp_path / "hub"), limit=1)
    shown = {name: headline(name, task, found) for name, task in tasks.items()}
    assert list(shown) == ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"]
    assert all(0 <= value <= 1 for _, value in shown.values())

    def prompt(name: str) -> str:
        return str(found["samples"][name][0]["arguments"][0][0])

    subjects = [name for name in found["samples"] if name.startswith("mmlu_")]
    assert len(subjects) == 57
    assert prompt("arc_challenge").count("Question:") == 25 + 1
    assert prompt("hellaswag").count("Counting:") == 10 + 1
    assert all(prompt(name).count("Answer:") == 5 + 1 for name in subjects)
    assert prompt("truthfulqa_mc2").count("Is ") == 1
    assert prompt("winogrande").count("hid the bag") == 5 + 1
    assert prompt("gsm8k").count("####") == 5
    # The probability share of the true answers, computed by hand.
    (sample,) = found["samples"]["truthfulqa_mc2"]
    likely = [2.718281828459045 ** float(response[0]) for response in sample["filtered_resps"]]
    assert shown["truthfulqa_mc2"] == ("acc", pytest.approx(sum(likely[:2]) / sum(likely)))
