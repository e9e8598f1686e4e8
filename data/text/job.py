"""A preparation job: settings shared by all tasks, and the records of completed tasks.

A job consists of a few stages over numbered items. A task is a pure function of the job, its item and the
files of earlier stages, so its files do not depend on where or how often it runs. Files are written
atomically, and the task's record comes last: a task with a record is not run again, and a retry replaces the
files of a failed task.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.text.conversations import ChatFormat
from train.recipe.preparation import CONVERSATIONS, Preparation, Source
from train.recipe.schema import Tokenizer
from train.record.files import write_whole

Result = dict[str, Any]
OUT = "out"


@dataclass(frozen=True)
class PreparationJob:
    """A recipe's preparation, small enough to be sent with every task."""

    work: Path
    """Work folder, visible to all workers: results of the stages, and the shards in ``out/``."""
    sources: tuple[Source, ...]
    preparation: Preparation
    evaluation_files: tuple[str, ...]
    tokenizer: Tokenizer
    sequence_tokens: int
    spooled: bool
    """True for given documents, which are already clean and deduplicated: nothing is removed."""
    chat: ChatFormat | None = None
    """Renders the chats of the sources, if they have any."""

    def is_masked(self, domain: str) -> bool:
        """Returns whether only some tokens of a domain have a loss."""
        return any(source.kind in CONVERSATIONS for source in self.sources if source.domain == domain)

    @property
    def out(self) -> Path:
        """The folder that becomes the shards."""
        return self.work / OUT

    def file(self, stage: str, number: int, suffix: str) -> Path:
        """The path of a task's file."""
        return self.work / stage / f"{number:06}.{suffix}"

    def once(self, stage: str, number: int, make: Callable[[], Result]) -> Result:
        """Returns a task's result from its record, or runs the task and writes the record."""
        record = self.file(stage, number, "json")
        if record.is_file():
            done: Result = json.loads(record.read_text())
            return done
        record.parent.mkdir(parents=True, exist_ok=True)
        result = make()
        write_whole(record, json.dumps(result, sort_keys=True), sync=False)
        return result


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes an array that :func:`numpy.load` can map."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getbuffer(), sync=False)
