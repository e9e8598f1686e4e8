"""New folders of weights: made, or refused in a line with nothing overwritten."""

from pathlib import Path

import pytest

from train.hf.folders import make_new_folder
from train.recipe.errors import UserError


def test_only_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    make_new_folder(tmp_path / "a/b")
    make_new_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").write_text("kept")
    refusals = {
        tmp_path / "a": "already exists; name a new folder",
        tmp_path / "file": "already exists; name a new folder",
        tmp_path / "file/out": r"can't be made \(Not a directory\); name a folder on a disk with room",
        tmp_path / ("x" * 300): r"can't be made \(File name too long\); name",
        Path("/proc/out"): r"/proc/out: can't be made \(No such file or directory\); name",
    }
    for folder, refusal in refusals.items():
        with pytest.raises(UserError, match=refusal) as found:
            make_new_folder(folder)
        assert "\n" not in str(found.value)
    assert (tmp_path / "file").read_text() == "kept"
