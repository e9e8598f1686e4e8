"""Evaluation of a suite on a decoder; each rank takes a share of the questions, each question runs once.

The same code runs in the training loop, in any layout, and on checkpoints. Accuracy is LLM Foundry's metric;
each question's log-likelihoods are kept as well, for comparison and inspection.

Shapes: B sequences, S tokens, V vocabulary.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.evaluate.scorer import Scorer
from train.evaluate.suite import Scores, Suite, Task, TaskKind, score
from train.evaluate.tasks import Questions, open_tasks, scratch_folder

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Answered:
    """The model's answer to one question."""

    task: str
    category: str
    index: int
    """Index in the file, or in its category."""
    is_correct: bool
    choice: int | None = None
    """Selected option of a multiple-choice question: the most likely per token."""
    gold: int | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    """Log-likelihood of each continuation, in nats, summed over its tokens."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Length of each continuation."""
    text: str = ""
    """The generated text."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Accuracy of a task."""

    accuracy: float
    """Mean over the file's categories if it is split by them; else over questions."""
    questions: int
    seconds: float
    categories: dict[str, float]


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """The results of a suite; the same on every rank, except that only rank 0 has all answers."""

    results: dict[str, TaskResult]
    scores: Scores
    answers: list[Answered]


def run_suite(
    scorer: Scorer,
    suite: Suite,
    names: Sequence[str],
    data: Path,
    tokenizer: Any,
    *,
    sequences: int = 8,
    most: int | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> SuiteResult:
    """Evaluates tasks; every rank calls it.

    Args:
        scorer: the decoder.
        suite: the tasks and their weighting.
        names: the tasks to evaluate.
        data: folder of the task files.
        tokenizer: a Hugging Face tokenizer.
        sequences: sequences per forward pass; a question's sequences are never split.
        most: questions per task, or per category of its file; None: all.
        progress: called with the task, the number of finished batches and their total.

    Raises:
        UserError: for a task file of the wrong kind.
    """
    results: dict[str, TaskResult] = {}
    answers: list[Answered] = []
    with scratch_folder(scorer.topology) as scratch:
        for name in names:
            begun = time.perf_counter()
            task, accuracies, questions = suite.tasks[name], {}, 0
            for part in open_tasks(name, task, data, tokenizer, scorer.limit, scratch, most):
                accuracies[part.category], answered = _run_questions(
                    scorer, name, task, part, sequences, progress
                )
                answers += answered
                questions += len(part.examples)
            mean = sum(accuracies.values()) / len(accuracies)
            split = accuracies if task.by_category else {}
            results[name] = TaskResult(mean, questions, time.perf_counter() - begun, split)
    scores = score(suite, {name: result.accuracy for name, result in results.items()})
    return SuiteResult(results, scores, _gather(answers, scorer))


def _run_questions(
    scorer: Scorer,
    name: str,
    task: Task,
    part: Questions,
    sequences: int,
    progress: Callable[[str, int, int], None],
) -> tuple[float, list[Answered]]:
    """Runs a task's questions; returns the accuracy over all ranks and this rank's answers."""
    metric = _metric(task.kind).to(scorer.device)
    rank, ranks = scorer.topology.rank, scorer.topology.world_size
    choices = part.examples[0].get("continuation_indices")
    rows = (
        len(choices)
        if task.kind in (TaskKind.multiple_choice, TaskKind.schema) and choices is not None
        else 1
    )
    size = max(1, sequences // rows)
    share = -(-len(part.examples) // ranks)
    answered: list[Answered] = []
    for start in range(0, share, size):
        mine = [rank + ranks * i for i in range(start, min(start + size, share))]
        real = [i for i in mine if i < len(part.examples)]
        # A rank with no questions left still joins the forward pass, with a question that does not count.
        batch = _trim(part.dataset.collate_fn([part.examples[i] for i in real or [0]]), task.kind)
        if task.kind is TaskKind.generation:
            outcomes = _generate(scorer, batch, part.dataset, task, metric if real else None)
        else:
            outcomes = _choose(scorer, batch, metric if real else None)
        answered += [Answered(name, part.category, i, **o) for i, o in zip(real, outcomes, strict=False)]
        progress(name, start // size + 1, -(-share // size))
    return float(metric.compute()), answered


def _metric(kind: TaskKind) -> Any:
    from llmfoundry.eval.metrics import nlp

    if kind is TaskKind.generation:
        return nlp.InContextLearningGenerationExactMatchAccuracy()
    if kind is TaskKind.language_modeling:
        return nlp.InContextLearningLMAccuracy()
    return nlp.InContextLearningMultipleChoiceAccuracy()


def _trim(batch: dict[str, Any], kind: TaskKind) -> dict[str, Any]:
    """Removes columns in which all sequences are padding: LLM Foundry pads to the limit.

    Prompts to be continued are left-padded, everything else right-padded.
    """
    length = max(1, int(batch["attention_mask"].sum(dim=1).max()))
    kept = slice(-length, None) if kind is TaskKind.generation else slice(0, length)
    for key in ("input_ids", "attention_mask"):
        batch[key] = batch[key][:, kept]
    if kind is not TaskKind.generation:
        batch["labels"] = batch["labels"][:, kept]
    return batch


def _choose(scorer: Scorer, batch: dict[str, Any], metric: Any) -> list[dict[str, Any]]:
    """Scores continuations in one forward pass with the metric."""
    logits_BSV = scorer.logits(batch["input_ids"])
    if metric is None:
        return []
    # The metric expects a token's prediction and label at the previous token's position.
    labels_BS = batch["labels"].roll(-1, dims=1).to(scorer.device)
    labels_BS[:, -1] = IGNORE
    spans = [span.to(scorer.device) for span in batch["continuation_indices"]]
    batch = batch | {"continuation_indices": spans}
    outcome = metric.update(batch, logits_BSV, labels_BS)
    sums = [_log_likelihood(logits_BSV[i], labels_BS[i], span) for i, span in enumerate(spans)]
    groups = batch.get("choice_groupings") or [(i, i + 1) for i in range(len(spans))]
    found = []
    for number, (start, end) in enumerate(groups):
        answer: dict[str, Any] = {
            "is_correct": bool(outcome["result"][number]),
            "logprobs": sums[start:end],
            "tokens": [len(span) for span in spans[start:end]],
        }
        if "gold_indices" in batch:
            answer["choice"] = int(outcome["selected_choice_idx"][number])
            answer["gold"] = int(batch["gold_indices"][number])
        found.append(answer)
    return found


def _log_likelihood(logits_SV: Tensor, labels_S: Tensor, span: Tensor) -> float:
    """Returns the log-likelihood of a continuation in nats."""
    logprobs = torch.log_softmax(logits_SV[span - 1], dim=-1)
    return float(logprobs.gather(1, labels_S[span - 1][:, None]).sum())


def _generate(
    scorer: Scorer, batch: dict[str, Any], dataset: Any, task: Task, metric: Any
) -> list[dict[str, Any]]:
    """Generates greedy answers and scores them with the metric."""
    prompts = [
        ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    tokenizer, stops = dataset.tokenizer, list(task.stop)

    def is_done(ids: list[int]) -> bool:
        if not ids:
            return False
        return ids[-1] == tokenizer.eos_token_id or any(stop in tokenizer.decode(ids) for stop in stops)

    most = int(batch["generation_kwargs"]["max_new_tokens"])
    answers = scorer.continue_greedily(prompts, most, is_done)
    if metric is None:
        return []
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    # The metric splits by regular expressions, but our stops are plain text.
    quoted = batch | {"stopping_criteria": [re.escape(stop) for stop in stops] or None}
    outcome = metric.update(quoted, texts, batch["labels"])
    return [
        {"is_correct": bool(right), "text": text}
        for right, text in zip(outcome["result"], texts, strict=True)
    ]


def _gather(answers: list[Answered], scorer: Scorer) -> list[Answered]:
    """Gathers all ranks' answers on rank 0, in the order of tasks and files; other ranks keep their own."""
    if scorer.topology.world_size == 1:
        return answers
    gathered: list[Any] | None = [None] * scorer.topology.world_size if scorer.topology.is_main else None
    dist.gather_object(answers, gathered, dst=0)
    if gathered is None:
        return answers
    order = {
        name: place for place, name in enumerate(dict.fromkeys(a.task for part in gathered for a in part))
    }
    merged = [answer for part in gathered for answer in part]
    return sorted(merged, key=lambda a: (order[a.task], a.category, a.index))
