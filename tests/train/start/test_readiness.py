"""Missing shards and unwritable folders end a start before torch is imported, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from train.recipe.errors import UserError
from train.recipe.exit_status import INTERRUPTED_STATUS, PREEMPTED_STATUS
from train.recipe.reading import to_yaml
from train.recipe.schema import Recipe
from train.record.run_folder import batches_of
from train.record.step_log import read_steps
from train.start.readiness import check_readiness

TinyRecipe = Callable[..., Recipe]
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("runs_dir={}/file/runs", r"r\.yaml: runs_dir: .* can't be written \(.*file is no folder\); name a"),
        ("data.shards={}/file/shards", r"data\.shards: .*file is no folder\); give a folder"),
        ("runs_dir=/proc/none", r"runs_dir: /proc can't be written to \(.*\); name a folder"),
        ("runs_dir={}/" + "x" * 300, r"runs_dir: can't be written \(File name too long\); name a folder"),
        ("tokenizer.path={}/none", r"tokenizer\.path: no .*none; correct the path"),
        ("tokenizer.chat_template={}", r"tokenizer\.chat_template: .* can't be read \(Is a directory\)"),
        ("data.corpus=null", r"data\.shards: no shards at .*none .*write_shards"),
        ("data.remote={}/none data.corpus=null", r"data\.remote: no shards at .*none; .*--upload"),
    ],
)
def test_what_is_missing_is_one_line_and_leaves_nothing_behind(
    override: str, error: str, tmp_path: Path, tiny_recipe: TinyRecipe
) -> None:
    (tmp_path / "file").touch()
    overrides = override.format(tmp_path).split()
    recipe = tiny_recipe(tmp_path / "runs", tmp_path / "none", "try", *overrides)
    with pytest.raises(UserError, match=error) as found:
        check_readiness(recipe, "r.yaml")
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_says_so_before_torch_is_imported(tmp_path: Path, tiny_recipe: TinyRecipe) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(tiny_recipe(tmp_path / "runs", tmp_path / "none", "try", "data.corpus=null")))
    code = f"import sys; from train.main import main; print(main([{str(file)!r}]), 'torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.stdout == "2 False\n", ended.stderr
    assert ended.stderr.startswith(f"{file}: data.shards: no shards at ") and ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.slow
def test_ctrl_c_under_composer_saves_and_says_so(tmp_path: Path, tiny_recipe: TinyRecipe) -> None:
    long = ("training.duration_tokens=6144000", "data.max_epochs=1000")
    recipe = tiny_recipe(tmp_path / "runs", tmp_path / "shards", "try", *long)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    composer = Path(sys.executable).with_name("composer")
    with (tmp_path / "log").open("w") as log:
        # A session of its own is what a terminal's Ctrl-C reaches: launcher, ranks and their loaders.
        process = subprocess.Popen(
            [composer, "-n", "2", "train/main.py", file],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    steps, end = tmp_path / "runs/try/metrics.jsonl", time.monotonic() + 300
    said = (tmp_path / "log").read_text
    try:
        while not read_steps(steps) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert process.poll() is None, said()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == PREEMPTED_STATUS, said()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    last = read_steps(steps)[-1]["step"]
    assert f"Ctrl-C: saved and ended after batch {last}; the same command resumes the run" in said()
    newest = next(iter(batches_of(tmp_path / "runs/try/checkpoints")))
    assert newest == last


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once_and_the_last_checkpoint_resumes(
    tmp_path: Path, tiny_recipe: TinyRecipe
) -> None:
    # A batch outlasts the two seconds between the signals, and the first one is saved.
    long = ("training.global_batch_sequences=512", "training.microbatch_sequences=1", "data.max_epochs=1000")
    saves = ("training.duration_tokens=3276800", "checkpoint.interval_batches=1")
    file, checkpoints = tmp_path / "recipe.yaml", tmp_path / "runs/try/checkpoints"
    file.write_text(to_yaml(tiny_recipe(tmp_path / "runs", tmp_path / "shards", "try", *long, *saves)))
    command = [Path(sys.executable).with_name("composer"), "-n", "2", "train/main.py", file]

    def ended(log: Path, batches: int) -> int:
        """Starts the run, and gives it Ctrl-C twice once so many batches are saved; returns its status."""
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + 300
        try:
            while next(iter(batches_of(checkpoints)), 0) < batches and process.poll() is None:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            assert process.poll() is None, log.read_text()
            for pause in (2.0, 0.0):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(pause)
            return process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    assert ended(tmp_path / "first", 1) == INTERRUPTED_STATUS, (tmp_path / "first").read_text()
    assert "once more ends at once, without saving" in (tmp_path / "first").read_text()
    assert list(batches_of(checkpoints)) == [1]
    assert ended(tmp_path / "second", 2) == INTERRUPTED_STATUS, (tmp_path / "second").read_text()
    assert [line["step"] for line in read_steps(tmp_path / "runs/try/metrics.jsonl")][:2] == [1, 2]
    assert "batch 1/" not in (tmp_path / "second").read_text(), "it resumes after the first"
