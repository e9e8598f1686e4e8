"""Fixtures of all tests: one thread, since tensors are tiny and a second thread would only wait."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import, after this file.
