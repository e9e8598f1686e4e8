"""Shards take their place on links and mounts, and what was there is not lost before."""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data.shards.manifest import MANIFEST_FILE, check_shards
from data.text import placement
from data.text.engines import Processes
from data.text.placement import Placement, placement_of
from data.write_shards import build_shards
from tests.data.conftest import small_documents
from train.recipe.errors import UserError
from train.recipe.schema import Recipe


def files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def write(root: Path, content: str, *names: str) -> Path:
    for name in (MANIFEST_FILE, *names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture(params=[False, True], ids=["next to it", "inside"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Placement:
    (tmp_path / "shards").mkdir()
    made = Placement(tmp_path / "shards", is_inside=request.param)
    made.work.mkdir()
    return made


def test_new_shards_replace_old_ones(place: Placement):
    write(place.folder, "old", "web/old")
    (place.folder / "lost+found").mkdir()
    with place.locked():
        place.check()
        place.take(write(place.work / "out", "new", "web/a", "code/b"))
    assert {name: text for name, text in files(place.folder).items() if not name.startswith(".")} == {
        MANIFEST_FILE: "new", "web/a": "new", "code/b": "new",
    }  # fmt: skip


@pytest.mark.parametrize("die_at", range(9))
def test_a_process_that_is_killed_while_it_replaces_loses_nothing(
    place: Placement, monkeypatch: pytest.MonkeyPatch, die_at: int
):
    """After every rename the next start finds either all old or all new shards, and the new ones again."""
    write(place.folder, "old", "web/old")
    write(place.work / "out", "new", "web/a", "code/b")
    renames, rename = [], Path.rename

    def killed(path: Path, target: Path) -> Path:
        if len(renames) == die_at:
            os._exit(9)
        renames.append(path)
        return rename(path, target)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", killed)
        place.take(place.work / "out")
        os._exit(0)
    assert os.waitpid(child, 0)[1] in (0, 9 << 8)
    with placement_of(place.folder).locked() if not place.is_inside else place.locked():
        found = {name for name in files(place.folder) if not name.startswith(".")}
        new = {MANIFEST_FILE, "web/a", "code/b"}
        if (place.folder / MANIFEST_FILE).read_text() == "old":
            assert found == {MANIFEST_FILE, "web/old"}
            assert set(files(place.work / "out")) == new
            place.take(place.work / "out")
        assert {name for name in files(place.folder) if not name.startswith(".")} == new


def test_a_failing_move_puts_the_old_shards_back(place: Placement, monkeypatch: pytest.MonkeyPatch):
    write(place.folder, "old", "web/old")
    write(place.work / "out", "new", "web/a")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.parent == place.work or path.parent == place.work / "out":
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with place.locked(), pytest.raises(OSError, match="busy"):
        place.take(place.work / "out")
    assert {it for it in files(place.folder) if not it.startswith(".")} == {MANIFEST_FILE, "web/old"}


def test_where_shards_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "disk/target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/target")
    (tmp_path / "dangling").symlink_to(tmp_path / "disk/new")
    assert placement_of(tmp_path / "link").work == tmp_path / "disk/.target.partial"
    assert placement_of(tmp_path / "dangling").work == tmp_path / "disk/.new.partial"
    # A folder of the same disk that is mounted, as containers do, in the kernel's spelling.
    (tmp_path / "a volume").mkdir()
    (tmp_path / "mounts").write_text(f"36 35 98:0 /x {tmp_path}/a\\040volume rw - ext4 /dev/x rw\n")
    monkeypatch.setattr(placement, "_MOUNTS", tmp_path / "mounts")
    assert placement_of(tmp_path / "a volume").work == tmp_path / "a volume/.a volume.partial"
    assert not placement_of(tmp_path / "link").is_inside


@pytest.mark.slow
@pytest.mark.parametrize("where", ["link", "dangling", "mounted"])
def test_shards_are_built_on_links_and_mounts(
    where: str, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "large").mkdir()
    target = {"link": "large", "dangling": "large/new", "mounted": "large"}[where]
    root = tmp_path / "large"
    if where != "mounted":
        root = tmp_path / "shards"
        root.symlink_to(tmp_path / target)
    else:
        (tmp_path / "mounts").write_text(f"36 35 98:0 /x {root} rw - ext4 /dev/x rw\n")
        monkeypatch.setattr(placement, "_MOUNTS", tmp_path / "mounts")
    recipe = make_recipe(root)
    manifest = build_shards(recipe, documents=small_documents)
    assert check_shards(root, every_byte=True) == manifest
    assert build_shards(recipe, documents=small_documents, rebuild=True) == manifest
    assert (tmp_path / target / MANIFEST_FILE).is_file() and not list(tmp_path.rglob("*.partial"))
    assert root.is_symlink() == (where != "mounted")


def test_what_can_not_hold_shards_is_one_line(tmp_path: Path, make_recipe: Callable[..., Recipe]):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.shards: .*/file is no folder"):
        build_shards(make_recipe(tmp_path / "file"), documents=small_documents)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(
        UserError, match=r"data.shards: .*/file can't be written to \((Not a directory|File exists)"
    ):
        build_shards(make_recipe(tmp_path / "file/shards"), documents=small_documents)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"data.shards: .*/loop is a link that leads to itself"):
        build_shards(make_recipe(tmp_path / "loop"), documents=small_documents)
    with pytest.raises(UserError, match=r"data.shards: /proc can't be written to"):
        build_shards(make_recipe(Path("/proc/shards")), documents=small_documents)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 10_000, 30_000])
def test_a_full_disk_is_one_line(tmp_path: Path, make_recipe: Callable[..., Recipe], limit: int):
    """A process may be limited as a disk is: it may not write files beyond a size."""
    recipe = make_recipe(tmp_path / "shards")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            build_shards(recipe, documents=small_documents, engine=Processes(1))
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(reading) as stream:
        line = stream.read()
    assert line.startswith("data.shards: no room is left for") and "make room" in line and "\n" not in line
    assert not (tmp_path / "shards").exists()
