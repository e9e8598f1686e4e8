"""Engines that run a stage's tasks: processes on this machine, or Spark. The output is identical."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zipimport import zipimporter

from tqdm import tqdm

from data.text.job import PreparationJob, Result
from data.tokenizer import encode_on_one_thread
from train.recipe.errors import UserError
from train.recipe.topology import usable_cores
from train.record import log
from train.record.process import end_with_parent

logger = log.get_logger(__name__)

Item = TypeVar("Item")
Stage = Callable[[PreparationJob, Item], Result]
ROOT = Path(__file__).resolve().parents[2]


class Engine(Protocol):
    """Runs tasks."""

    def run(self, title: str, stage: Stage[Item], job: PreparationJob, items: Sequence[Item]) -> list[Result]:
        """Runs a stage for each item and returns the results in order."""


class Processes:
    """Runs tasks on this machine's cores.

    Args:
        workers: number of processes; 1: only this one.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, title: str, stage: Stage[Item], job: PreparationJob, items: Sequence[Item]) -> list[Result]:
        """Runs a stage for each item and returns the results in order, with a progress bar."""
        with self._mapped(partial(stage, job), items) as results:
            return list(
                tqdm(
                    results, desc=title, total=len(items), unit="task", mininterval=1, disable=len(items) == 1
                )
            )

    @contextmanager
    def _mapped(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Iterator[Result]]:
        workers = min(self._workers, len(items))
        if workers <= 1:
            yield map(task, items)
            return
        _import_for_tasks()
        # Forked: a new interpreter would import everything again. Children open their own tokenizers.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin_worker)
        try:
            yield pool.map(task, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Prepares a process of the pool, which must not outlive a job that a signal ends."""
    end_with_parent()
    encode_on_one_thread()


def _import_for_tasks() -> None:
    """Imports the modules that tasks import lazily, so that not every forked process has to."""
    with suppress(ModuleNotFoundError):  # Only for text in Parquet and Arrow files.
        import pyarrow.parquet

        pyarrow.array([0])  # The first conversion imports pandas.


class Spark:
    """Runs tasks on a Spark cluster, or in a local Spark session if no cluster is configured.

    All workers must see the folder of the shards, and this checkout at the same path. Spark retries failed
    tasks; the retry replaces the files of the failed attempt.

    Args:
        workers: cores of a local session; ignored on a cluster.
    """

    def __init__(self, workers: int) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError:
            remedy = "install pyspark from requirements.lock, or omit --engine"
            raise UserError("pyspark is not installed", key="--engine spark", remedy=remedy) from None
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        paths = dict.fromkeys([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        builder: Any = SparkSession.builder
        builder = builder.appName("finegrain-shards").config("spark.executorEnv.PYTHONPATH", str(ROOT))
        # spark-submit has already set a master; in a local session a task has four attempts.
        if "PYSPARK_GATEWAY_PORT" not in os.environ and SparkSession.getActiveSession() is None:
            builder = builder.master(f"local[{workers},4]").config("spark.ui.enabled", "false")
        try:
            self.context = builder.getOrCreate().sparkContext
        except Exception as error:  # Py4J and the JVM's launcher raise unrelated classes.
            what = f"Spark does not start ({' '.join(str(error).split())[:150]})"
            raise UserError(what, key="--engine spark", remedy="it needs Java 8, 11 or 17") from None

    def run(self, title: str, stage: Stage[Item], job: PreparationJob, items: Sequence[Item]) -> list[Result]:
        """Runs a stage for each item and returns the results in order."""
        logger.info(f"{title}: {len(items)} tasks on Spark")
        if not items:
            return []
        tasks = self.context.parallelize(list(items), len(items))
        results: list[Result] = tasks.map(partial(_on_spark, stage, job)).collect()
        return results

    def stop(self) -> None:
        """Ends the session."""
        self.context.stop()


def _on_spark(stage: Stage[Item], job: PreparationJob, item: Item) -> Result:
    """Runs a task in Spark's Python worker, and makes two costs between tasks cheaper.

    After each task the worker collects garbage, among all objects that imports created, and looks for new
    modules on every path, for which Python 3.11 re-reads the contents of zip files (5,000 in Spark's jar).
    Each took 0.1 to 0.3 s, longer than many tasks.
    """
    encode_on_one_thread()  # Spark starts a process for each core.
    result = stage(job, item)
    _freeze(len(sys.modules))
    for path, finder in list(sys.path_importer_cache.items()):
        if isinstance(finder, zipimporter):  # It is created again if a module is imported from there.
            del sys.path_importer_cache[path]
    return result


@lru_cache(maxsize=1)
def _freeze(modules: int) -> None:
    """Excludes existing objects from garbage collection; repeated only if a task imported more modules.

    Args:
        modules: number of modules in this process, the cache's key.
    """
    gc.collect()
    gc.freeze()


def open_engine(name: str, workers: int | None) -> Engine:
    """Opens an engine by its command-line name: ``local`` or ``spark``.

    Raises:
        UserError: if Spark is missing or does not start.
    """
    count = workers or usable_cores()
    return Spark(count) if name == "spark" else Processes(count)
