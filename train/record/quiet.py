"""What would only be noise to a user: idle warnings of libraries, bars within bars."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path


def quiet_libraries() -> None:
    """Leaves out warnings of what is as it should be: of checkpoints, forked loaders, LLM Foundry's tasks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in (
        "torch.distributed is disabled",
        "TypedStorage is deprecated",
        "To copy construct from a tensor",
    ):
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def no_bars() -> Iterator[None]:
    """Lets nothing be printed to standard error, where progress bars are."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield
