"""EleutherAI's lm-eval on a Hugging Face folder, with datasets read from local files.

An lm-eval task names a dataset of the Hub. Here that name is a path below a folder:
``OWNER/NAME/CONFIG/SPLIT.jsonl`` (``default`` if the task names no config), so every lm-eval task runs
unchanged without network access.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.recipe.errors import UserError
from train.recipe.secrets import guarded_environment


@dataclass(frozen=True)
class HarnessTask:
    """Settings for an lm-eval task."""

    shots: int | None = None
    """Examples before each question; None: the task's own number."""
    metric: str = ""
    """The metric to report, by lm-eval's name; empty: the first."""


@guarded_environment()
def read_tasks(text: str) -> dict[str, HarnessTask]:
    """Reads tasks from a YAML file (``TASK: {shots: N, metric: NAME}``), or from comma-separated names.

    Raises:
        UserError: for a file of another format.
    """
    if not text.endswith((".yaml", ".yml")):
        return {name: HarnessTask() for name in text.split(",") if name}
    try:
        tree = OmegaConf.load(text)
        if not isinstance(tree, DictConfig):
            raise UserError("is not a mapping of tasks", remedy="write `task: {shots: N}` lines", file=text)
        found = {}
        for name, fields in tree.items():
            task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HarnessTask), fields))
            assert isinstance(task, HarnessTask)
            found[str(name)] = task
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(
            str(error).split("\n")[0], remedy="write `task: {shots: N, metric: NAME}` lines", file=text
        ) from None
    return found


def run_harness(
    folder: Path,
    tasks: Mapping[str, HarnessTask],
    *,
    data: Path | None,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Runs lm-eval tasks.

    Args:
        folder: a Hugging Face folder with model and tokenizer.
        tasks: by lm-eval's names, including groups such as mmlu.
        data: local datasets as above; None: lm-eval may use the network.
        include: folder of custom task files in lm-eval's format.
        limit: questions per task.
        batch_size: sequences per forward pass.
        device: cpu or cuda.
        dtype: data type of weights and arithmetic.

    Returns:
        ``results`` by task (and ``groups``), ``samples`` with every question's log-likelihoods.

    Raises:
        UserError: for an unknown task or missing data.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(
                f"lm-eval has no task {name!r}", key="--harness", remedy="`lm-eval ls tasks` lists them"
            )
    merged: dict[str, Any] = {"results": {}, "groups": {}, "samples": {}}
    with local_datasets(data):
        # One call per number of shots, as lm-eval applies one to all tasks.
        for shots in dict.fromkeys(task.shots for task in tasks.values()):
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": dtype},
                tasks=[name for name, task in tasks.items() if task.shots == shots],
                num_fewshot=shots,
                limit=limit,
                batch_size=batch_size,
                device=device,
                task_manager=manager,
                # lm-eval's bootstrap pool would inherit Composer's SIGTERM handler and hang.
                bootstrap_iters=0,
            )
            assert found is not None
            for key in merged:
                merged[key] |= found.get(key, {})
    return merged


def headline(name: str, task: HarnessTask, results: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the reported metric of a task and its value.

    Raises:
        UserError: if lm-eval has no such metric for the task.
    """
    figures = results["results"].get(name) or results["groups"].get(name) or {}
    known = {
        key.removesuffix(",none"): value
        for key, value in figures.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }
    metric = task.metric or next(iter(known), "")
    if metric not in known:
        raise UserError(f"has no metric {metric!r}", key=name, remedy=f"one of {', '.join(known)}")
    return metric, float(known[metric])


@contextmanager
def local_datasets(data: Path | None) -> Iterator[None]:
    """Makes lm-eval read its datasets from a folder, without network access."""
    if data is None:
        yield
        return
    import datasets

    class _Splits(datasets.DatasetDict):
        """Splits by name; a missing one raises only on access, as lm-eval always looks up few-shot splits."""

        def __init__(self, folder: Path, splits: Any) -> None:
            super().__init__(splits)
            self.folder = folder

        def __missing__(self, split: str) -> Any:
            raise UserError(
                "lacks this split, which lm-eval's task reads",
                remedy="put it there as JSON lines",
                file=str(self.folder / f"{split}.jsonl"),
            )

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, *_: Any, **settings: Any) -> Any:
        if path == "json":  # A custom task that names local files itself.
            return original(path, name, **settings)
        folder = data / path / (name or "default")
        files = {file.stem: str(file) for file in sorted(folder.glob("*.jsonl"))}
        if not files:
            raise UserError(
                f"contains no SPLIT.jsonl, which lm-eval needs for {path}",
                remedy="put the dataset's splits there as JSON lines",
                file=str(folder),
            )
        return _Splits(folder, original("json", data_files=files))

    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before = {key: os.environ.get(key) for key in variables}
    os.environ |= variables
    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
