"""Distributions of documents' scores, from which a threshold can be chosen before anything is removed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.text.scores import COLUMNS

# N documents, Q candidates for a threshold, B bins.

CANDIDATES = 201
"""Quantiles of a score that are offered as thresholds."""
BINS = 48
SHOWN = 300
"""Documents of a domain whose beginnings the page has."""
MOST_ROWS = 2_000_000
"""Rows read of a domain; of more, evenly spaced row groups."""


@dataclass(frozen=True)
class Distribution:
    """The values of a score."""

    at: list[float]
    """Candidates for a threshold, rising [Q]."""
    below: list[int]
    """Documents with a lower score than each [Q]."""
    above: list[int]
    """Documents with a higher score than each [Q]."""
    kept_below: list[int]
    """Of those that are in the shards now [Q]."""
    kept_above: list[int]
    edges: list[float]
    """Borders of the bins [B + 1], from the first to the 99th percentile; the outer bins have the rest."""
    bins: list[int]
    """Documents in each bin [B]."""


@dataclass(frozen=True)
class ScoredDomain:
    """The scores of a domain."""

    rows: int
    """Documents that could be read, and whose scores were read now."""
    kept: int
    """Those of them that are in the shards."""
    scores: dict[str, Distribution]
    sample: list[dict[str, Any]]
    """Some documents: place, reason of removal, language, text, and their scores by name."""


def read_scores(path: Path) -> ScoredDomain:
    """Reads a domain's ``scores.parquet``, one column at a time."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        present = file.schema_arrow.names
        names = [name for columns in COLUMNS.values() for name in columns if name in present]
        groups = _some_groups(file)
        reasons = file.read_row_groups(groups, ["reason"])["reason"].to_numpy(zero_copy_only=False)
        is_kept_N = reasons == ""
        scores = {}
        for name in names:
            values_N = file.read_row_groups(groups, [name])[name].to_numpy(zero_copy_only=False)
            if np.isfinite(values_N).any():
                scores[name] = _distribution(values_N.astype(np.float32), is_kept_N)
        sample = _sample(file, groups, list(scores))
    return ScoredDomain(is_kept_N.size, int(is_kept_N.sum()), scores, sample)


def _some_groups(file: Any) -> list[int]:
    count = file.num_row_groups
    stride = max(1, -(-file.metadata.num_rows // MOST_ROWS))
    return list(range(0, count, stride))


def _distribution(values_N: NDArray[np.float32], is_kept_N: NDArray[np.bool_]) -> Distribution:
    """Counts how many documents each threshold would remove; those without a score stay."""
    has_N = np.isfinite(values_N)
    every, kept = np.sort(values_N[has_N]), np.sort(values_N[has_N & is_kept_N])
    at_Q = np.unique(np.quantile(every, np.linspace(0, 1, CANDIDATES), method="nearest"))
    low, high = (float(it) for it in np.quantile(every, (0.01, 0.99)))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    bins, _ = np.histogram(np.clip(every, edges[0], edges[-1]), edges)
    return Distribution(
        at_Q.tolist(),
        np.searchsorted(every, at_Q, "left").tolist(),
        (every.size - np.searchsorted(every, at_Q, "right")).tolist(),
        np.searchsorted(kept, at_Q, "left").tolist(),
        (kept.size - np.searchsorted(kept, at_Q, "right")).tolist(),
        edges.tolist(),
        bins.tolist(),
    )


def _sample(file: Any, groups: list[int], names: list[str]) -> list[dict[str, Any]]:
    """Evenly spaced documents of those with an excerpt."""
    from pyarrow import compute

    found: list[dict[str, Any]] = []
    for group in groups:
        table = file.read_row_group(group, ["place", "reason", "language", "excerpt", *names])
        found += table.filter(compute.is_valid(table["excerpt"])).to_pylist()
    chosen = np.unique(np.linspace(0, len(found) - 1, min(SHOWN, len(found))).astype(int))
    return [found[n] for n in chosen]
