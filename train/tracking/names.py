"""Keys of parameters, metrics and tags as MLflow accepts them."""

import hashlib
import posixpath
import re

from train.record import metrics

LONGEST_KEY = 250
"""MLflow's limit."""
_PARTS = {metrics.LOSS_BALANCE, metrics.LOSS_Z, metrics.LOSS_LOGIT_Z, metrics.LOSS_MTP}
"""Losses that are parts of another, and are charted behind it."""
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


def chart_key(key: str) -> str:
    """Returns a metric's key for MLflow, under which its pages chart losses before everything else.

    A chart's group is what stands before the last slash of its key, and groups are sorted by their letters'
    codes: one with a capital stands first. So ``loss/train`` becomes ``Loss/train``, and ``loss/balance``
    ``Loss/parts/balance``, which otherwise would stand before it.
    """
    group, _, rest = key.partition("/")
    if group != "loss":
        return mlflow_key(key)
    return mlflow_key(f"Loss/parts/{rest}" if key in _PARTS else f"Loss/{rest}")
