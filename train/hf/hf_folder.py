"""Writes weights of ours as a Hugging Face folder: files of safetensors, index, config, tokenizer, card.

Weights are streamed: from a checkpoint one tensor at a time, from a folder of safetensors in blocks of
some megabytes, whatever the size of the model. An imported folder that nothing has changed goes back
into the files that it came in, byte for byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train.hf import model_card
from train.hf.folders import HEADERS_FILE, SOURCE_FOLDER, read_json
from train.hf.hf_mapping import Link, family_for
from train.hf.lineage import write_provenance
from train.hf.safetensors_io import (
    TensorInfo,
    all_finite,
    make_header,
    parse_header,
    plan_files,
    write_files,
    write_index,
)
from train.hf.weights import Weights, WeightSource, row_blocks
from train.recipe.errors import UserError

DEFAULT_SHARD_BYTES = 5_000_000_000

Layout = Mapping[str, tuple[bytes, Sequence[TensorInfo]]]
"""Header and tensors of each file."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: str
    architecture: str
    dtype: str
    files: dict[str, str]
    """SHA-256 of each file of weights."""
    bytes: int


def write_folder(
    source: WeightSource, out: Path, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> Exported:
    """Writes the folder.

    Args:
        source: what to export.
        out: the folder; must not exist, or be empty.
        dtype: type of the weights; None keeps the one that they are stored in.
        shard_bytes: most bytes per file; None takes 5e9, or the files that an imported folder came in.

    Raises:
        UserError: if no architecture expresses the model, a weight is not finite, or the folder
            is in use.
    """
    family = family_for(source.model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    links = {link.theirs: link for link in family.links(source.model)}
    layout = _layout(source, links, dtype, shard_bytes)
    digests = _write_weights(source.weights, links, layout, out)
    write_index(out, {name: tensors for name, (_, tensors) in layout.items()})
    written = _most_common_dtype(layout)
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    model_card.write_texts(out, source, config | family.from_model(source.model), written)
    write_provenance(out, source.path, digests)
    size = sum((out / name).stat().st_size for name in digests)
    return Exported(str(out), family.architecture, written, digests, size)


def _write_weights(weights: Weights, links: Mapping[str, Link], layout: Layout, out: Path) -> dict[str, str]:
    """Streams tensors to files and returns each file's SHA-256."""
    total = sum(info.bytes for _, group in layout.values() for info in group)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", mininterval=1.0) as bar:

        def blocks(group: Sequence[TensorInfo]) -> Iterator[Tensor]:
            for info in group:
                for block in _tensor_blocks(weights, links[info.name], info.dtype):
                    if not all_finite(block):
                        raise UserError(f"{links[info.name].ours}: holds NaN or infinity")
                    yield block
                    bar.update(block.numel() * block.element_size())

        jobs = {name: (header, blocks(group)) for name, (header, group) in layout.items()}
        digests = dict(write_files(out, jobs))
    return {name: digests[name] for name in layout}


def _tensor_blocks(weights: Weights, link: Link, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor of theirs in blocks of rows, or whole where it is a transposed part of ours."""
    if link.ours is None:
        yield torch.zeros(link.shape, dtype=dtype)
    elif link.transposed:
        yield weights.read(link.ours, link.first, link.first + link.rows).t().to(dtype)
    else:
        for block in row_blocks(weights, link.ours, link.first, link.first + link.rows):
            yield block.to(dtype)


def _layout(
    source: WeightSource, links: Mapping[str, Link], dtype: torch.dtype | None, shard_bytes: int | None
) -> Layout:
    stored = source.weights.tensors
    fallback = next(iter(stored.values())).dtype
    infos = {
        name: TensorInfo(name, dtype or (stored[link.ours].dtype if link.ours else fallback), link.shape)
        for name, link in links.items()
    }
    headers = source.path / SOURCE_FOLDER / HEADERS_FILE
    if shard_bytes is None and headers.is_file():
        before = _layout_before(headers)
        if {info.name: info for _, group in before.values() for info in group} == infos:
            return before
    files = plan_files(list(infos.values()), shard_bytes or DEFAULT_SHARD_BYTES)
    return {name: (make_header(group), group) for name, group in files.items()}


def _layout_before(headers: Path) -> Layout:
    """The files that an imported folder came in."""
    layout = {}
    for name, text in read_json(headers).items():
        header = text.encode()
        layout[name] = (header, [placed.info for placed in parse_header(Path(name), header)])
    return layout


def _most_common_dtype(layout: Layout) -> str:
    """Type of most of the bytes, as PyTorch calls it."""
    sizes: dict[str, int] = {}
    for _, group in layout.values():
        for info in group:
            name = str(info.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + info.bytes
    return max(sizes, key=lambda name: sizes[name])
