"""Logging: the `logging` module with a rank filter, as plain lines or as one JSON object per line.

A module's logger is ``get_logger(__name__)``. Its lines go to standard error, from rank 0 only; to log from
every rank, pass ``extra=ALL_RANKS``. :data:`progress` is for the progress of training, on standard output.
The results of a command, tables and figures, are printed rather than logged.
"""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.secrets import without_secrets
from train.recipe.topology import Topology

ROOT = "finegrain"
PROGRESS = "progress"
ALL_RANKS = {"all_ranks": True}
"""``extra`` of a message that every rank writes."""


class _Formatter(logging.Formatter):
    """Formats a record as plain text, optionally with time and level, or as a JSON object."""

    def __init__(self, *, as_json: bool = False, timestamps: bool = False) -> None:
        super().__init__()
        self.as_json, self.timestamps = as_json, timestamps

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        message = without_secrets(record.getMessage())
        if record.exc_info:
            message += "\n" + without_secrets(self.formatException(record.exc_info))
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z"
        if self.as_json:
            fields: dict[str, object] = {
                "time": when,
                "level": record.levelname.lower(),
                "logger": record.name.removeprefix(f"{ROOT}."),
                "rank": _rank(),
                "message": message,
            }
            return json.dumps(fields)
        return f"{when} {record.levelname:7} {message}" if self.timestamps else message


class _RankFilter(logging.Filter):
    """Drops records on ranks other than 0, unless they are meant for all ranks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True if this rank writes the record."""
        return getattr(record, "all_ranks", False) or _rank() == 0


class _Lines(logging.Handler):
    """Writes each record as a line to the current ``sys.stdout`` or ``sys.stderr``."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        try:
            print(self.format(record), file=getattr(sys, self.stream), flush=True)
        except Exception:  # A logging failure must not stop training: logging's own rule.
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """Returns the logger of a module, such as ``data.text.build``."""
    return logging.getLogger(f"{ROOT}.{name}")


progress = get_logger(PROGRESS)
"""The progress of training; goes to standard output."""
_libraries = _Lines("stderr")
"""Handles the messages of libraries, from every rank, if logs are JSON."""


def _attach() -> None:
    """Attaches handlers to our loggers, once per process."""
    for name, stream in ((ROOT, "stderr"), (f"{ROOT}.{PROGRESS}", "stdout")):
        logger = logging.getLogger(name)
        handler = _Lines(stream)
        handler.addFilter(_RankFilter())
        logger.addHandler(handler)
        logger.propagate = False
    configure()


def configure(*, quiet: bool = False, as_json: bool = False, timestamps: bool = False) -> None:
    """Configures the logging of this process.

    Args:
        quiet: only warnings and errors.
        as_json: one object per line with time, level, logger, rank and message, also for libraries'
            messages and warnings.
        timestamps: time and level before each line of text.
    """
    formatter = _Formatter(as_json=as_json, timestamps=timestamps)
    logging.getLogger(ROOT).setLevel(logging.WARNING if quiet else logging.INFO)
    for logger in (logging.getLogger(ROOT), progress):
        for handler in logger.handlers:
            handler.setFormatter(formatter)
    _libraries.setFormatter(formatter)
    logging.captureWarnings(as_json)
    if as_json:
        logging.getLogger().addHandler(_libraries)
    else:
        logging.getLogger().removeHandler(_libraries)


def options() -> list[str]:
    """Returns the command-line options that make another process log like this one."""
    formatter = progress.handlers[0].formatter
    assert isinstance(formatter, _Formatter)
    asked = {
        "--quiet": is_quiet(),
        "--json-logs": formatter.as_json,
        "--timestamps": formatter.timestamps,
    }
    return [option for option, is_asked in asked.items() if is_asked]


def is_quiet() -> bool:
    """Returns True if only warnings and errors are written."""
    return not progress.isEnabledFor(logging.INFO)


def quiet_libraries() -> None:
    """Hides warnings about intended behaviour: checkpoints, forked loaders, LLM Foundry's tasks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in (
        "torch.distributed is disabled",
        "TypedStorage is deprecated",
        "To copy construct from a tensor",
    ):
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Discards messages below warnings of all loggers, such as MLflow's forty on a new store's migrations."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def no_bars() -> Iterator[None]:
    """Discards standard error, to which libraries write their progress bars."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


def _rank() -> int:
    """Returns this process's rank; 0 if the launcher's variables are invalid, so every rank reports it."""
    try:
        return Topology.from_environment().rank
    except UserError:
        return 0


_attach()
