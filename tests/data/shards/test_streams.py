import gc
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from data.shards.open_maps import OpenMaps
from data.shards.packing import Sample
from data.shards.streams import ShardFolder
from train.recipe.errors import UserError
from train.recipe.schema import Recipe


@pytest.fixture
def many_shards(tmp_path: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """30 samples in small shards."""
    from streaming import MDSWriter

    columns = {"documents": "ndarray:int64", "lengths": "ndarray:int32", "tokens": "ndarray:int32:16"}
    rng = np.random.default_rng(0)
    samples = []
    with MDSWriter(
        columns=columns, out=str(tmp_path / "shards"), hashes=["sha256"], size_limit=700
    ) as writer:
        for number in range(30):
            tokens = rng.integers(0, 2**31 - 1, 16).astype(np.int32)
            pieces = 1 + number % 3
            lengths = np.array([16 - pieces + 1] + [1] * (pieces - 1), np.int32)
            samples.append({"tokens": tokens, "lengths": lengths, "documents": np.arange(pieces) + number})
            writer.write(samples[-1])
    assert len(list((tmp_path / "shards").glob("*.mds"))) > 5
    return tmp_path / "shards", samples


def same(sample: Sample, expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(getattr(sample, name), value) for name, value in expected.items())


@pytest.mark.parametrize("small_bytes", [0, 1_000_000])
def test_any_order_over_many_shards(
    many_shards: tuple[Path, list[dict[str, np.ndarray]]], small_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data.shards.index.SMALL_BYTES", small_bytes)
    path, samples = many_shards
    folder = ShardFolder(path)
    assert len(folder) == 30
    for number in [*np.random.default_rng(1).permutation(30).tolist(), 0, 29]:
        assert same(folder[number], samples[number])


def test_few_shards_stay_open(
    many_shards: tuple[Path, list[dict[str, np.ndarray]]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data.shards.open_maps.OPEN_SHARDS", 2)
    path, samples = many_shards
    folder = ShardFolder(path)
    for number in [0, 29, 15, 0, 1, 29]:
        assert same(folder[number], samples[number])
        assert len(folder.open_shards) <= 2


@contextmanager
def at_most_files(count: int) -> Iterator[None]:
    """Lowers this process's limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def own_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No maps of folders that other tests have opened count, or give way."""
    monkeypatch.setattr("data.shards.streams._OPEN", OpenMaps())


def take_the_rest() -> list[int]:
    taken: list[int] = []
    with suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    return taken


def open_shards() -> int:
    """Returns the open shards of this process; other files come and go."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(os.path.realpath(link).partition(" ")[0].endswith(".mds") for link in links)


@pytest.mark.usefixtures("own_maps")
def test_all_folders_of_a_process_share_the_limit_of_open_files(
    many_shards: tuple[Path, list[dict[str, np.ndarray]]], tmp_path: Path
):
    path, samples = many_shards
    paths = [path, *(tmp_path / f"copy-{n}" for n in range(1, 40))]
    for copy in paths[1:]:
        shutil.copytree(path, copy)
    with at_most_files(320):
        folders = [ShardFolder(it) for it in paths]
        for number in (0, 29, 15, 5, 22):
            assert all(same(folder[number], samples[number]) for folder in folders)
        assert sum(len(folder.open_shards) for folder in folders) == 160
        # The maps of folders that nobody reads any more are closed.
        gc.collect()
        opened = open_shards()
        del folders
        gc.collect()
        assert open_shards() == opened - 160


@pytest.mark.usefixtures("own_maps")
def test_maps_give_way_to_files_that_something_else_opens(
    many_shards: tuple[Path, list[dict[str, np.ndarray]]],
):
    path, samples = many_shards
    folder, other = ShardFolder(path), ShardFolder(path)
    with at_most_files(len(os.listdir("/proc/self/fd")) + 60):  # noqa: PTH208
        for number in range(30):
            assert same(folder[number], samples[number])
        before = len(folder.open_shards)
        taken = take_the_rest()
        try:
            assert same(other[29], samples[29]) and len(folder.open_shards) < before
            taken += take_the_rest()
            with pytest.raises(UserError, match=r"no file left to open a shard with.*ulimit -n"):
                for number in range(30):
                    other[number]
        finally:
            for descriptor in taken:
                os.close(descriptor)


def test_a_plain_streaming_dataset_with_the_default_collate_reads_our_shards(built: Recipe):
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    path = Path(built.data.shards) / "prose/train"
    theirs = StreamingDataset(local=str(path), shuffle=False, batch_size=4)
    ours = ShardFolder(path)
    assert len(theirs) == len(ours)
    at = 0
    for batch in DataLoader(theirs, batch_size=4, num_workers=0):
        assert batch["tokens"].shape[1:] == (32,)
        for row, documents, lengths in zip(
            batch["tokens"], batch["documents"], batch["lengths"], strict=True
        ):
            columns = {
                "documents": np.frombuffer(documents, np.int64),
                "lengths": np.frombuffer(lengths, np.int32),
            }
            assert same(ours[at], columns | {"tokens": row.numpy()})
            at += 1
    assert at == len(ours) and any(len(ours[n].lengths) != len(ours[0].lengths) for n in range(len(ours)))


def test_pickles_are_refused(tmp_path: Path):
    from streaming import MDSWriter

    with MDSWriter(columns={"tokens": "pkl"}, out=str(tmp_path / "shards")) as writer:
        writer.write({"tokens": [1, 2]})
    with pytest.raises(ValueError, match="unsafe type"):
        ShardFolder(tmp_path / "shards")
