"""Fixtures of all tests: one thread, since tensors are tiny and a second thread would only wait."""

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import, after this file.


@pytest.fixture(scope="session", autouse=True)
def stays_forkable() -> None:
    """Starts autograd before any test does, so that tests can fork ranks later.

    Autograd starts a thread for each device at its first backward pass, and a process with such threads
    cannot fork ranks that use autograd. Fake tensors, which torch.compile and the fake process group use,
    register a device that is none, and in torch 2.15 a first backward pass after that starts a thread for it.
    """
    if "torch" in sys.modules:
        import torch

        if not torch.cuda.is_available():
            torch.ones((), requires_grad=True).backward()
    # Else each collection visits all that was imported, and one in a forked process copies it.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals_as_in_a_new_process() -> Iterator[None]:
    """Takes back what Composer's import and a test's command make of signals.

    A test's pool would hand it on to its processes. SIGTERM then ends one by an exception, lost where the
    signal comes just after the fork, in a callback of it; the pool waits for that process for ever.
    """
    handlers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_unconfigure() -> None:
    """Lets the end collect what was imported, as extension modules expect that count what they leave."""
    gc.unfreeze()
