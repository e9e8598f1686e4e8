"""Tasks of a suite as LLM Foundry's in-context learning datasets, tokenised with the run's tokenizer."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.tokenizer import TokenizerHandle
from train.evaluate.suite import Task, TaskKind
from train.evaluate.task_files import check_task_file
from train.recipe.errors import UserError
from train.recipe.topology import Topology

FOUNDRY_TYPES = {TaskKind.generation: "generation_task_with_answers"}
"""LLM Foundry's names of task types that differ from ours."""


@dataclass(frozen=True)
class Questions:
    """Questions that share their shots: a task, or one category of its file."""

    category: str
    """Empty if the file is not split."""
    dataset: Any
    """LLM Foundry's InContextLearningDataset."""
    examples: list[dict[str, Any]]
    """Tokenised, with shots, in the file's order; the same on every rank."""


def hugging_face_tokenizer(handle: TokenizerHandle) -> Any:
    """Converts a run's tokenizer to the Hugging Face tokenizer that LLM Foundry's datasets need."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        handle.to_hugging_face(Path(folder))
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if made.pad_token_id is None:
        made.pad_token = made.eos_token
    return made


@contextmanager
def scratch_folder(topology: Topology) -> Iterator[Path]:
    """Creates a temporary folder with the same name on every rank, for LLM Foundry's copies of task files.

    On each node, LLM Foundry's local rank 0 writes the copies, and the other ranks wait for them.
    """
    with tempfile.TemporaryDirectory(prefix="evaluation-") as own:
        name: list[Any] = [own]
        if topology.world_size > 1:
            dist.broadcast_object_list(name, src=0)
        folder = Path(name[0])
        folder.mkdir(parents=True, exist_ok=True)
        with _datasets_cache(Path(own) / f"cache-{topology.rank}"):
            yield folder
        if topology.world_size > 1:
            dist.barrier()


def open_tasks(
    name: str, task: Task, data: Path, tokenizer: Any, limit: int, scratch: Path, most: int | None
) -> list[Questions]:
    """Tokenises the questions of a task.

    Args:
        name: name of the task.
        task: its settings.
        data: folder of the task files.
        tokenizer: a Hugging Face tokenizer with a padding token.
        limit: maximum sequence length in tokens; longer contexts are cut at their beginning.
        scratch: see :func:`scratch_folder`.
        most: number of questions per category, from the first; None: all. Shots are drawn from the whole file
            in either case, so the questions are the same as in the full task.

    Raises:
        UserError: if the file is not of this kind of task.
    """
    from llmfoundry.eval.datasets.in_context_learning_evaluation import get_icl_task_dataloader

    check_task_file(data / task.file, task, tokenizer.all_special_tokens)
    settings: dict[str, Any] = {
        "max_seq_len": limit,
        "pad_tok_id": tokenizer.pad_token_id,
        "num_fewshot": task.shots,
        "continuation_delimiter": task.continuation_delimiter,
        "prelimiter": task.prelimiter,
    }
    if task.kind is TaskKind.generation:
        settings |= {"cot_delimiter": task.cot_delimiter, "do_normalization": task.normalize}
        settings["early_stopping_criteria"] = list(task.stop) or None
    try:
        loaders = get_icl_task_dataloader(
            FOUNDRY_TYPES.get(task.kind, task.kind.value),
            str((data / task.file).resolve()),
            tokenizer,
            batch_size=1,
            has_categories=task.by_category,
            destination_path=str(scratch / f"{name}.jsonl"),
            kwargs=settings,
        )
        parts = loaders if isinstance(loaders, dict) else {"": loaders}
        return [
            Questions(
                category, loader.dataloader.dataset, _prepare(loader.dataloader.dataset, task.shots, most)
            )
            for category, loader in parts.items()
        ]
    except Exception as error:  # LLM Foundry and datasets raise unrelated classes for a wrong file.
        raise UserError(
            f"cannot be read as {task.kind.value}: {type(error).__name__}: {error}",
            key=name,
            remedy="see docs/evaluation.md for the format of a task file",
            file=str(data / task.file),
        ) from error


def _prepare(dataset: Any, shots: int, most: int | None) -> list[dict[str, Any]]:
    """Prepares the first questions as the dataset itself does, but without writing files."""
    count = len(dataset) if most is None else min(most, len(dataset))
    return [
        dataset._prep_example(dataset.dataset[i], i, shots, dataset.prompt_string, dataset.fewshot_rng)
        for i in range(count)
    ]


@contextmanager
def _datasets_cache(folder: Path) -> Iterator[None]:
    """Makes the datasets library use this cache folder, without progress bars."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    had_bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        if had_bars:
            datasets.enable_progress_bars()
