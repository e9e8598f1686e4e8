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
def signals_as_before() -> Iterator[None]:
    """Takes back what a test's command made of signals: a later test's pool would hand it on to its workers,
    which then don't end.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        if handler is not None:  # else it is not Python's
            signal.signal(number, handler)


def pytest_unconfigure() -> None:
    """Lets the end collect what was imported, as extension modules expect that count what they leave."""
    gc.unfreeze()
