"""Both scorers agree question by question, and so do one rank and two."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Model, Moe, Parallelism, Precision, Recipe, Tokenizer, TokenizerKind
from train.recipe.topology import Topology

if TYPE_CHECKING:
    from train.evaluate.run_suite import Answered, SuiteResult
    from train.model.decoder import Decoder

pytestmark = pytest.mark.slow

MakeRun = Callable[[Recipe], tuple[Path, "Decoder"]]

MODEL = Model(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_size=40,
    vocab_size=400,
    max_sequence_tokens=160,
    clip_qkv=8,
    moe=Moe(experts=4, top_k=2),
)


def _recipe(shards: Path) -> Recipe:
    recipe = load_recipe(Path(__file__).parents[3] / "yamls/smoke.yaml")
    return replace(
        recipe,
        name="small",
        model=MODEL,
        data=replace(recipe.data, shards=str(shards)),
        tokenizer=Tokenizer(kind=TokenizerKind.bpe, vocab_size=MODEL.vocab_size),
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("offline")
def test_a_run_and_its_export_under_lm_eval_agree_question_by_question(
    small_tasks: Any, tmp_path: Path, make_run: MakeRun
) -> None:
    from train.evaluate.__main__ import main
    from train.evaluate.harness import HarnessTask, headline, run_harness
    from train.hf.__main__ import main as hf

    run, _ = make_run(_recipe(small_tasks.shards))
    answers, figures = tmp_path / "answers.jsonl", tmp_path / "figures.json"
    common = ["--suite", str(small_tasks.suite), "--data", str(small_tasks.data)]
    assert main([str(run), *common, "--answers", str(answers), "--json", str(figures)]) == 0
    ours = [json.loads(line) for line in answers.read_text().splitlines()]
    accuracy = json.loads(figures.read_text())[0]["suite"]["tasks"]

    assert hf(["export", str(run), str(tmp_path / "hf")]) == 0
    tasks = {
        name: HarnessTask(shots=0, metric="acc") for name in ("arc_easy", "winogrande", "lambada_openai")
    }
    theirs = run_harness(tmp_path / "hf", tasks, data=small_tasks.hub)
    for name, questions in (("arc_easy", 7), ("winogrande", 5), ("lambada_openai", 7)):
        mine = [answer for answer in ours if answer["task"] == name]
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(mine) == len(samples) == questions
        for answer, sample in zip(mine, samples, strict=True):
            responses = [float(response[0]) for response in sample["filtered_resps"]] if name != (
                "lambada_openai"
            ) else [float(sample["filtered_resps"][0][0])]  # fmt: skip
            assert answer["logprobs"] == pytest.approx(responses, abs=1e-4)
            if name == "lambada_openai":
                assert answer["is_correct"] == bool(sample["acc"])
                continue
            # lm-eval takes the largest sum of log-likelihoods, LLM Foundry the largest mean per token.
            per_token = [r / n for r, n in zip(responses, answer["tokens"], strict=True)]
            assert answer["choice"] == per_token.index(max(per_token))
            assert answer["logprobs"].index(max(answer["logprobs"])) == responses.index(max(responses))
            if len(set(answer["tokens"])) == 1:
                assert answer["is_correct"] == bool(sample["acc"])
        assert any(abs(a - b) > 1e-3 for a in mine[0]["logprobs"] for b in mine[-1]["logprobs"])
    # Both continuations have the same length, so even the accuracy is equal.
    assert headline("winogrande", tasks["winogrande"], theirs)[1] == pytest.approx(
        accuracy["winogrande"]["accuracy"]
    )
    assert (
        headline("lambada_openai", tasks["lambada_openai"], theirs)[1]
        == (accuracy["lambada_openai"]["accuracy"])
    )


def test_lm_eval_is_told_which_local_file_is_missing(small_tasks: Any, tmp_path: Path) -> None:
    import datasets

    from train.evaluate.harness import local_datasets

    with local_datasets(small_tasks.hub):
        with pytest.raises(UserError, match=r"default/dev.jsonl: lacks this split"):
            datasets.load_dataset("EleutherAI/lambada_openai", "default")["dev"]

        assert len(datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")["test"]) == 7
        with pytest.raises(UserError, match=r"cais/mmlu/anatomy: contains no SPLIT.jsonl"):
            datasets.load_dataset("cais/mmlu", "anatomy")


def _evaluate(decoder: "Decoder", tasks: Any, topology: Topology) -> "SuiteResult":
    from data.tokenizer import open_tokenizer
    from train.evaluate.run_suite import run_suite
    from train.evaluate.scorer import Scorer
    from train.evaluate.suite import load_suite
    from train.evaluate.tasks import hugging_face_tokenizer

    tokenizer = open_tokenizer(Tokenizer(TokenizerKind.bpe, 400), tasks.shards)
    suite = load_suite(tasks.suite)
    scorer = Scorer(decoder, Precision.fp32, topology, MODEL.max_sequence_tokens)
    bridge = hugging_face_tokenizer(tokenizer)
    return run_suite(scorer, suite, list(suite.tasks), tasks.data, bridge, sequences=6)


def _sharded(tasks: Any, topology: Topology) -> "SuiteResult":
    from train.layout.mesh import build_mesh, build_sharded
    from train.model.decoder import Decoder

    decoder = Decoder(MODEL, device="meta")
    mesh = build_mesh(Parallelism(expert=2), topology.world_size, "cpu")
    build_sharded(decoder, mesh, Precision.fp32, seed=3)
    return _evaluate(decoder.eval(), tasks, topology)


def _places(answers: "list[Answered]") -> list[tuple[str, str, int]]:
    return [(answer.task, answer.category, answer.index) for answer in answers]


@pytest.mark.usefixtures("offline")
def test_two_ranks_put_each_question_once_and_score_as_one(small_tasks: Any) -> None:
    from launch.verify.forked_ranks import run_ranks
    from train.model.decoder import Decoder
    from train.model.init import initialize

    decoder = Decoder(MODEL, device="cpu")
    initialize(decoder, MODEL, seed=3)
    alone = _evaluate(decoder.eval(), small_tasks, Topology())
    together = run_ranks(2, lambda topology: _sharded(small_tasks, topology), timeout_seconds=240)
    assert len(_places(alone.answers)) == len(set(_places(alone.answers))) == 7 + 7 + 5 + 7 + 7
    assert _places(together[0].answers) == _places(alone.answers)
    for one, two in zip(alone.answers, together[0].answers, strict=True):
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert (two.is_correct, two.choice, two.text) == (one.is_correct, one.choice, one.text)
    for ranks in together:
        assert {n: r.accuracy for n, r in ranks.results.items()} == {
            n: pytest.approx(r.accuracy) for n, r in alone.results.items()
        }
        assert ranks.scores.average == pytest.approx(alone.scores.average)
    topics = alone.results["topics"]
    assert topics.accuracy == pytest.approx(sum(topics.categories.values()) / 2)
    assert not math.isnan(topics.accuracy)


def test_a_limit_takes_the_first_questions_of_the_full_task(small_tasks: Any) -> None:
    from data.tokenizer import open_tokenizer
    from train.evaluate.suite import load_suite
    from train.evaluate.tasks import hugging_face_tokenizer, open_tasks, scratch_folder

    bridge = hugging_face_tokenizer(open_tokenizer(Tokenizer(TokenizerKind.bpe, 400), small_tasks.shards))
    task = load_suite(small_tasks.suite).tasks["sums"]
    with scratch_folder(Topology()) as scratch:
        (whole,) = open_tasks("sums", task, small_tasks.data, bridge, 160, scratch, None)
        (part,) = open_tasks("sums", task, small_tasks.data, bridge, 160, scratch, 3)
    texts = [
        [bridge.decode([i for i in e["context"] if i != bridge.pad_token_id]) for e in p.examples]
        for p in (whole, part)
    ]
    assert texts[1] == texts[0][:3]
    assert texts[0][3].count(" and ") == 3 and texts[0][3].endswith("3 and 3 is")
