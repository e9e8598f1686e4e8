"""For all tests: tensors are tiny, so a second thread only waits, and for long on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Read when torch is imported, after this file.
