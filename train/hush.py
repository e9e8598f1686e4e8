"""Warnings of libraries that tell a user nothing."""

import os
import warnings


def hush_libraries() -> None:
    """Leaves out warnings of what is as it should be: of checkpoints, forked loaders, LLM Foundry's tasks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in (
        "torch.distributed is disabled",
        "TypedStorage is deprecated",
        "To copy construct from a tensor",
    ):
        warnings.filterwarnings("ignore", message=message)
