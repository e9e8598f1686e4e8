"""Keys of parameters, metrics and tags as MLflow accepts them."""

import hashlib
import posixpath
import re

LONGEST_KEY = 250
"""MLflow's limit."""
_UNFIT = re.compile(r"[^\w\-.: /]")


def mlflow_key(key: str) -> str:
    """Returns a key for MLflow: itself if MLflow accepts it, else one that is as different from all others.

    MLflow takes letters, digits, blanks and ``_-.:/``, and slashes only as in a path. In any other key, such
    as one of a domain ``c++``, the rest becomes ``_``, and the beginning of the key's hash follows.
    """
    fit = _UNFIT.sub("_", key)
    if posixpath.normpath(fit) != fit or fit.startswith(("/", "..")) or fit == ".":
        fit = re.sub(r"^\.+|/", "_", fit)
    if fit == key and len(key) <= LONGEST_KEY:
        return key
    mark = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{fit[: LONGEST_KEY - len(mark) - 1]}-{mark}"
