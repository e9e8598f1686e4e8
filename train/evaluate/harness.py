"""EleutherAI's lm-eval on a folder in Hugging Face's form, its datasets read from local files.

A task of lm-eval names a dataset of a hub. Here that name is a path below a folder:
``OWNER/NAME/CONFIG/SPLIT.jsonl`` (``default`` where the task names no config), so that every task of
lm-eval runs unchanged without a network.
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


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval as it is to be run."""

    shots: int | None = None
    """Examples before each question; None: as lm-eval's task says."""
    metric: str = ""
    """The metric that is shown, by lm-eval's name; empty: its first."""


def read_tasks(text: str) -> dict[str, HarnessTask]:
    """Tasks from a YAML file (``TASK: {shots: N, metric: NAME}``), or from names with commas between.

    Raises:
        UserError: for a file that says something else.
    """
    if not text.endswith((".yaml", ".yml")):
        return {name: HarnessTask() for name in text.split(",") if name}
    try:
        tree = OmegaConf.load(text)
        if not isinstance(tree, DictConfig):
            raise UserError("is no mapping of tasks", remedy="write `task: {shots: N}` lines", file=text)
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
    """Runs tasks of lm-eval.

    Args:
        folder: a model in Hugging Face's form with its tokenizer.
        tasks: by lm-eval's names; groups such as mmlu too.
        data: local datasets as above; None: lm-eval may use the network.
        include: folder with task files of one's own in lm-eval's form.
        limit: questions per task.
        batch_size: sequences of a forward pass.
        device: cpu or cuda.
        dtype: of weights and arithmetic.

    Returns:
        ``results`` by task (and ``groups``), ``samples`` with every question's log-likelihoods.

    Raises:
        UserError: for a task that lm-eval does not know, or data that is missing.
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
        # One call per number of shots: lm-eval takes one for all of its tasks.
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
                # Its bootstrap starts a pool whose processes inherit Composer's SIGTERM handler and hang.
                bootstrap_iters=0,
            )
            assert found is not None
            for key in merged:
                merged[key] |= found.get(key, {})
    return merged


def headline(name: str, task: HarnessTask, results: Mapping[str, Any]) -> tuple[str, float]:
    """The metric that is shown for a task, and its value.

    Raises:
        UserError: if lm-eval gave no such metric.
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
    """Has lm-eval's datasets read from a folder, and the network left alone."""
    if data is None:
        yield
        return
    import datasets

    class _Splits(datasets.DatasetDict):
        """Splits by name; lm-eval wants the one that shots come from even where there are none."""

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
        if path == "json":  # A task file of one's own that names local files itself.
            return original(path, name, **settings)
        folder = data / path / (name or "default")
        files = {file.stem: str(file) for file in sorted(folder.glob("*.jsonl"))}
        if not files:
            raise UserError(
                f"holds no SPLIT.jsonl, which lm-eval wants for {path}",
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
