"""Export to a Hugging Face folder: safetensors files, index, config, tokenizer, model card.

One file is in memory at a time, whatever the size of the model. An unchanged imported folder is exported to
the files that it came from, byte for byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train.hf import model_card
from train.hf.architectures import family_for
from train.hf.folders import HEADERS_FILE, SOURCE_FOLDER, make_new_folder, read_json
from train.hf.lineage import write_provenance
from train.hf.mapping import Link
from train.hf.safetensors_io import (
    DEFAULT_SHARD_BYTES,
    FilePlan,
    TensorInfo,
    check_finite,
    plan_files,
    plan_from_header,
    write_files,
    write_index,
)
from train.hf.weights import BALANCING_BIAS, Weights, WeightSource
from train.record.log import get_logger

logger = get_logger(__name__)

Layout = Mapping[str, FilePlan]
"""The contents of each file."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    folder: str
    architecture: str
    dtype: str
    files: dict[str, str]
    """SHA-256 of each file of weights."""
    bytes: int


def write_folder(
    source: WeightSource, out: Path, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> Exported:
    """Exports weights to a Hugging Face folder.

    Args:
        source: the weights to export.
        out: the folder; must not exist, or be empty.
        dtype: data type of the weights; None keeps the stored one.
        shard_bytes: maximum bytes per file; None takes 5e9, or the original files of an imported folder.

    Raises:
        UserError: if no architecture expresses the model, a weight is not finite, or the folder
            is in use.
    """
    family = family_for(replace(source.model, mtp=False))
    if source.model.mtp and not family.has_later_layers:
        logger.info(
            "export: leaves out the layer of multi-token prediction, for which "
            f"{family.architecture} has no place"
        )
        source = replace(source, model=replace(source.model, mtp=False))
    make_new_folder(out)
    links = {link.theirs: link for link in family.links(source.model)}
    layout = _layout(source, links, dtype, shard_bytes)
    digests = _write_weights(source.weights, links, layout, out)
    write_index(out, layout)
    written = _most_common_dtype(layout)
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    model_card.write_texts(out, source, config | family.from_model(source.model), written)
    write_provenance(out, source.path, digests, str(source.average or ""))
    size = sum((out / name).stat().st_size for name in digests)
    return Exported(str(out), family.architecture, written, digests, size)


def _write_weights(weights: Weights, links: Mapping[str, Link], layout: Layout, out: Path) -> dict[str, str]:
    """Writes the tensors and returns each file's SHA-256."""
    total = sum(info.bytes for plan in layout.values() for info in plan.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", mininterval=1.0) as bar:

        def read(info: TensorInfo) -> Tensor:
            tensor = _read(weights, links[info.name], info.dtype)
            check_finite(links[info.name].ours or info.name, tensor)
            bar.update(info.bytes)
            return tensor

        return dict(write_files(out, layout, read))


def _read(weights: Weights, link: Link, dtype: torch.dtype) -> Tensor:
    """Reads one of their tensors."""
    if link.ours is None:
        return torch.zeros(link.shape, dtype=dtype)
    rows = weights.read(link.ours, link.first, link.first + link.rows)
    return (rows.t() if link.transposed else rows).to(dtype)


def _layout(
    source: WeightSource, links: Mapping[str, Link], dtype: torch.dtype | None, shard_bytes: int | None
) -> Layout:
    stored = source.weights.tensors
    fallback = next(iter(stored.values())).dtype

    def dtype_of(link: Link) -> torch.dtype:
        # A balancing bias is of small steps, and stays fp32 in transformers too.
        wanted = None if (link.ours or "").endswith(BALANCING_BIAS) else dtype
        return wanted or (stored[link.ours].dtype if link.ours else fallback)

    infos = {name: TensorInfo(name, dtype_of(link), link.shape) for name, link in links.items()}
    headers = source.path / SOURCE_FOLDER / HEADERS_FILE
    if shard_bytes is None and headers.is_file():
        before = {name: plan_from_header(header) for name, header in read_json(headers).items()}
        if {info.name: info for plan in before.values() for info in plan.tensors} == infos:
            return before
    return plan_files(list(infos.values()), shard_bytes or DEFAULT_SHARD_BYTES)


def _most_common_dtype(layout: Layout) -> str:
    """Returns the data type of most of the bytes, by PyTorch's name."""
    sizes: dict[str, int] = {}
    for plan in layout.values():
        for info in plan.tensors:
            name = str(info.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + info.bytes
    return max(sizes, key=lambda name: sizes[name])
