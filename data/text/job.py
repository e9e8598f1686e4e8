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
from train.record.files import whole_file, write_whole

Result = dict[str, Any]
OUT = "out"
_HEADER_BYTES = 256


@dataclass(frozen=True)
class Limits:
    """Memory of a task, whatever the corpus."""

    span_documents: int = 1 << 20
    """Documents of which a task holds some numbers each."""
    buffer_bytes: int = 32_000_000
    """Rows that wait to be written, or are read at once."""
    sort_bytes: int = 96_000_000
    """Rows that are sorted at once."""


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
    limits: Limits = Limits()

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


class ArrayFile:
    """A file of an array of unknown length, written bit by bit; :func:`numpy.load` can map it.

    Used in a ``with`` statement; the file takes its place at its end.

    Args:
        path: the file.
        dtype: of the elements.
        shape: of an element.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self._dtype, self._shape, self._count = np.dtype(dtype), shape, 0
        self._file = whole_file(path)

    def __enter__(self) -> "ArrayFile":
        self._stream = self._file.__enter__()
        self._stream.write(self._header())
        return self

    def add(self, elements: Any) -> None:
        """Adds elements [N, ...] of the file's type and shape."""
        array = np.asarray(elements, self._dtype).reshape(-1, *self._shape)
        self._count += len(array)
        self._stream.write(array.tobytes())

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._stream.seek(0)
            self._stream.write(self._header())
        self._file.__exit__(*error)

    def _header(self) -> bytes:
        """The header of NumPy's format 1.0, of the same length for any number of elements."""
        described = np.lib.format.dtype_to_descr(self._dtype)
        tree = {"descr": described, "fortran_order": False, "shape": (self._count, *self._shape)}
        text = repr(tree).encode().ljust(_HEADER_BYTES - 11) + b"\n"
        return np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes an array that :func:`numpy.load` can map."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getbuffer(), sync=False)
