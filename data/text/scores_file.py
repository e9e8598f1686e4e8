"""Joins the scores of a domain's chunks to one file, once every document's fate is decided."""

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.text.decide import REMOVED
from data.text.decide import STAGE as DECIDE
from data.text.job import PreparationJob
from data.text.personal import KINDS
from data.text.scores import COLUMNS, KEY, SAMPLED, schema_of
from data.text.split import SPLITS
from train.record.files import sha256

ROWS = 65_536
"""Rows of a row group, whatever the chunks."""


def join_scores(
    job: PreparationJob, files: dict[int, Path], path: Path
) -> tuple[str | None, dict[str, int] | None]:
    """Writes a domain's scores from those of its chunks, a chunk at a time.

    Args:
        job: the job, whose documents have been decided.
        files: the scores of the domain's chunks, by number.
        path: the file to write.

    Returns:
        The hash of the file, None without scores; and the personal data of each kind in the documents kept,
        None if none was looked for.
    """
    files = {n: file for n, file in files.items() if file.is_file()}
    if not files:
        return None, None
    import pyarrow
    from pyarrow import parquet

    present = {name for file in files.values() for name in parquet.read_schema(file).names}
    schema = schema_of([name for columns in COLUMNS.values() for name in columns if name in present])
    last = _last_key(list(files.values()))
    waiting, totals = schema.empty_table(), dict.fromkeys(kinds := [it for it in KINDS if it in present], 0)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for number, file in files.items():
            decided = _decided(job, number, parquet.read_table(file), last, schema)
            _add_personal(totals, decided)
            waiting = pyarrow.concat_tables([waiting, decided]).combine_chunks()
            while len(waiting) >= ROWS:
                writer.write_table(waiting.slice(0, ROWS), ROWS)
                waiting = waiting.slice(ROWS)
        writer.write_table(waiting, ROWS)
    return sha256(path), totals if kinds else None


def _add_personal(totals: dict[str, int], decided: Any) -> None:
    from pyarrow import compute

    kept = decided.filter(compute.equal(decided["reason"], ""))
    for kind in totals:
        totals[kind] += int(compute.sum(kept[kind]).as_py() or 0)


def _last_key(files: Sequence[Path]) -> int:
    """The greatest key of the sample of a domain."""
    from pyarrow import compute, parquet

    few: list[int] = []
    for file in files:
        table = parquet.read_table(file, columns=[KEY, "excerpt"])
        keys = table[KEY].filter(compute.is_valid(table["excerpt"])).to_pylist()
        few = heapq.nsmallest(SAMPLED, [*few, *keys])
    return few[-1] if few else -1


def _decided(job: PreparationJob, number: int, table: Any, last: int, schema: Any) -> Any:
    """A chunk's rows with each document's split, or the reason why it was removed as a copy."""
    import pyarrow
    from pyarrow import compute

    reasons = table["reason"].to_numpy(zero_copy_only=False).astype(object)
    kept = np.flatnonzero(reasons == "")
    fate = np.load(job.file(DECIDE, number, "npy"))
    with job.file(DECIDE, number, "rejected.jsonl").open("rb") as lines:
        reasons[kept[fate == REMOVED]] = [json.loads(line)["reason"] for line in lines]
    splits = np.full(len(table), None, object)
    splits[kept] = np.array([None, *SPLITS], object)[fate]
    excerpts = compute.if_else(compute.less_equal(table[KEY], last), table["excerpt"], None)
    made = {
        "split": pyarrow.array(splits, pyarrow.string()),
        "reason": pyarrow.array(reasons, pyarrow.string()),
        "excerpt": excerpts,
    }
    columns = [
        made[it.name]
        if it.name in made
        else table[it.name]
        if it.name in table.column_names
        else pyarrow.nulls(len(table), it.type)
        for it in schema
    ]
    return pyarrow.table(columns, schema=schema)
