"""What every task of a job knows, and the record that says a task is done.

A job is a few stages over numbered items. A task is a pure function of the job, its item and the files
of the stages before, so that its files are the same whoever makes them, and how often. They are
renamed when whole; the record comes last: a task with a record is not done again, and files
of a task that failed are replaced by the next try.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.recipe.preparation import Preparation, Source
from train.recipe.schema import Tokenizer
from train.record.files import write_whole

Result = dict[str, Any]
OUT = "out"


@dataclass(frozen=True)
class PreparationJob:
    """A recipe's preparation, small enough to go with every task."""

    work: Path
    """Folder that all workers see: results of the stages, and the shards in ``out/``."""
    sources: tuple[Source, ...]
    preparation: Preparation
    evaluation_files: tuple[str, ...]
    tokenizer: Tokenizer
    sequence_tokens: int
    spooled: bool
    """Documents were given by the program, clean and without copies: nothing is removed."""

    @property
    def out(self) -> Path:
        """The folder that becomes the shards."""
        return self.work / OUT

    def file(self, stage: str, number: int, suffix: str) -> Path:
        """A file of a task."""
        return self.work / stage / f"{number:06}.{suffix}"

    def once(self, stage: str, number: int, make: Callable[[], Result]) -> Result:
        """The result of a task, from its record or made now."""
        record = self.file(stage, number, "json")
        if record.is_file():
            done: Result = json.loads(record.read_text())
            return done
        record.parent.mkdir(parents=True, exist_ok=True)
        result = make()
        write_whole(record, json.dumps(result, sort_keys=True), sync=False)
        return result


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes an array such that :func:`numpy.load` maps it."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getbuffer(), sync=False)
