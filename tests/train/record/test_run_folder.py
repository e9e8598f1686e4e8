"""A run's folder is claimed, resumed or renamed, and overwritten only on request."""

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.schema import Data, OnExisting, Recipe
from train.record.lease import release
from train.record.run_folder import SUMMARY_FILE, claim_run_folder, data_log_of, keep_data, note_saved

SMOKE = Path(__file__).resolve().parents[3] / "yamls/smoke.yaml"


def _recipe(runs: Path, *overrides: str) -> Recipe:
    return load_recipe(SMOKE, [f"runs_dir={runs}", "name=r", "on_existing=resume", *overrides])


def test_an_unfinished_run_is_resumed_and_a_complete_one_left(tmp_path: Path) -> None:
    first = claim_run_folder(_recipe(tmp_path))
    assert first.folder == tmp_path / "r" and not first.is_complete
    assert claim_run_folder(_recipe(tmp_path)).folder == first.folder
    (first.folder / SUMMARY_FILE).write_text("{}")
    assert claim_run_folder(_recipe(tmp_path)).is_complete


def test_another_recipe_is_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    folder = claim_run_folder(_recipe(tmp_path)).folder
    before = (folder / "recipe.yaml").read_text()
    other = _recipe(tmp_path, "optimizer.learning_rate=0.5", "seed=3")
    claim_run_folder(other)  # Nothing is trained yet.
    (folder / "metrics.jsonl").write_text('{"step":1}\n')
    said = r"optimizer.learning_rate: is 0.5, but .* with 0.003 \(and 1 other keys\); give .* another name"
    with pytest.raises(UserError, match=rf"{said}, or set on_existing=overwrite, which moves it aside"):
        claim_run_folder(other)
    (folder / "checkpoints/batch-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{said}, or fork it: name=NEW start.run={folder}$"):
        claim_run_folder(other)
    assert (folder / "recipe.yaml").read_text() == before
    claim_run_folder(_recipe(tmp_path, "data.workers=0", "checkpoint.keep_last=5", "guard.on_spike=skip"))


def test_a_key_that_is_not_read_refuses_no_resume(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    assert recipe.data.corpus_bytes != Data().corpus_bytes
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus=None))
    folder = claim_run_folder(recipe).folder
    note_saved(folder, 1)
    assert claim_run_folder(recipe).folder == folder
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus="installed"))
    with pytest.raises(UserError, match=r"data\.corpus: is installed, but .* started with None"):
        claim_run_folder(other)


def test_new_leaves_complete_runs_and_resumes_an_unfinished_one(tmp_path: Path) -> None:
    recipe = dataclasses.replace(_recipe(tmp_path), on_existing=OnExisting.new)
    for expected in ("r", "r-2", "r-3"):
        claim = claim_run_folder(recipe)
        assert claim.folder.name == expected == claim.recipe.name
        assert claim_run_folder(recipe).folder == claim.folder
        (claim.folder / SUMMARY_FILE).write_text("{}")


@pytest.mark.parametrize("is_link", [False, True])
def test_overwriting_moves_a_run_aside_and_keeps_what_its_folder_is(
    tmp_path: Path, is_link: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder may be a link to another disk, or a mount point, which cannot be removed."""
    recipe = dataclasses.replace(_recipe(tmp_path / "runs"), on_existing=OnExisting.overwrite)
    (tmp_path / "runs").mkdir()
    (tmp_path / "disk").mkdir()
    if is_link:
        (tmp_path / "runs/r").symlink_to(tmp_path / "disk")
    folder = claim_run_folder(recipe).folder
    (folder / "checkpoints/a").mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path)
    inode = folder.stat().st_ino
    for number in (1, 2):
        assert claim_run_folder(recipe).folder == folder
        inside = {f"replaced-{each}" for each in range(1, number + 1)} if is_link else set()
        names = {it.name for it in folder.iterdir()}
        assert names == {"lease", "recipe.yaml", "saved.json", *inside} and folder.stat().st_ino == inode
        aside = folder / f"replaced-{number}" if is_link else tmp_path / f"runs/r.replaced-{number}"
        assert f"the run that was in {folder} is now in {aside}" in capsys.readouterr().out
        kept = {it.name for it in aside.iterdir()}
        assert kept == {"recipe.yaml", "saved.json"} | ({"checkpoints", "linked"} if number == 1 else set())
    assert (tmp_path / ("disk/replaced-1" if is_link else "runs/r.replaced-1") / "checkpoints/a").is_dir()
    assert folder.is_symlink() == is_link and (tmp_path / "disk").is_dir()


def test_a_move_aside_that_was_interrupted_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(_recipe(tmp_path), on_existing=OnExisting.overwrite)
    folder = claim_run_folder(recipe).folder
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)
    rename = Path.rename
    for moved in range(6):

        def cut_off(self: Path, target: Path, left: list[int] = [moved]) -> Path:  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return rename(self, target)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "rename", cut_off)
            claim_run_folder(recipe)
    claim_run_folder(recipe)
    aside = {it.name for it in (tmp_path / "r.replaced-1").iterdir()}
    assert aside == {"a", "b", "c", "recipe.yaml", "saved.json"}


def test_overwrite_moves_a_run_but_never_a_folder_that_is_none(tmp_path: Path) -> None:
    recipe = dataclasses.replace(_recipe(tmp_path), on_existing=OnExisting.overwrite)
    folder = claim_run_folder(recipe).folder
    (folder / "metrics.jsonl").write_text("old")
    assert not (claim_run_folder(recipe).folder / "metrics.jsonl").exists()
    (folder / "recipe.yaml").unlink()
    (folder / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run"):
        claim_run_folder(recipe)
    assert (folder / "letters.txt").read_text() == "mine"


def test_a_run_resumes_only_with_its_own_data(tmp_path: Path) -> None:
    keep_data(tmp_path, {"code/train": "a" * 64})
    keep_data(tmp_path, {"code/train": "a" * 64, "new/train": "c" * 64})
    with pytest.raises(
        UserError, match=r"data\.shards: contains bbbb.* for code/train, .* started with aaaa"
    ):
        keep_data(tmp_path, {"code/train": "b" * 64})
    with pytest.raises(UserError, match="for new/train"):
        keep_data(tmp_path, {"new/train": "b" * 64})
    keep_data(tmp_path, {"code/train": "a" * 64})


def test_a_run_from_before_the_data_log_was_called_so_goes_on_with_it(tmp_path: Path) -> None:
    folder = claim_run_folder(_recipe(tmp_path)).folder
    (folder / "ledger.jsonl").write_text('{"step":1}\n')
    assert data_log_of(folder).name == "ledger.jsonl"
    claim_run_folder(_recipe(tmp_path))
    assert data_log_of(folder).read_text() == '{"step":1}\n'
    assert {file.name for file in folder.iterdir()} == {
        "recipe.yaml",
        "data_log.jsonl",
        "saved.json",
        "lease",
    }


@pytest.mark.slow
@pytest.mark.parametrize("on_existing", ["resume", "new", "overwrite"])
def test_a_run_that_another_process_trains_is_refused_and_left_as_it_is(
    tmp_path: Path, on_existing: str
) -> None:
    code = (
        "import sys, time; from train.record.run_folder import claim_run_folder as claim\n"
        "from train.recipe.reading import load_recipe\n"
        f"print(claim(load_recipe({str(SMOKE)!r}, sys.argv[1:])).folder, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, f"runs_dir={tmp_path}", "name=r", f"on_existing={on_existing}"]
    with subprocess.Popen(words, cwd=SMOKE.parents[1], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline().strip().decode() == str(tmp_path / "r")
        (tmp_path / "r/metrics.jsonl").write_text("mine")
        recipe = _recipe(tmp_path, f"on_existing={on_existing}")
        with pytest.raises(UserError, match=rf"name: .*/r is in use by process {first.pid} on .*; wait for"):
            claim_run_folder(recipe, grace_seconds=0.0)
        assert (tmp_path / "r/metrics.jsonl").read_text() == "mine"
        first.kill()
    assert claim_run_folder(recipe, grace_seconds=0.0).folder == tmp_path / "r"
    release(tmp_path / "r")


def test_a_start_that_ended_in_its_first_moment_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "r/lease").mkdir(parents=True)
    (tmp_path / "r/.recipe.yaml.n1.7.partial").write_text("name: ")
    assert (claim_run_folder(_recipe(tmp_path)).folder / "recipe.yaml").is_file()
    release(tmp_path / "r")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"runs_dir: .*file.* can't be written \(Not a directory\); name a folder"
    ):
        claim_run_folder(_recipe(tmp_path / "file"))


def test_a_damaged_record_of_the_data_is_one_line(tmp_path: Path) -> None:
    for content in (b"", b"[]", b'{"code/train": 7}', b"\xff", b'{"code/train'):
        (tmp_path / "data.json").write_bytes(content)
        with pytest.raises(UserError, match=r"data\.json is damaged; restore it"):
            keep_data(tmp_path, {"code/train": "a" * 64})
        assert (tmp_path / "data.json").read_bytes() == content
