"""Commands: errors end in one line and status 2, Ctrl-C in status 130, and figures are written atomically."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from train.recipe.errors import UserError
from train.record import log
from train.record.command import CommandGroup, Figures, command

ROOT = Path(__file__).resolve().parents[3]
FILES = [path for top in ("train", "data", "launch") for path in sorted((ROOT / top).rglob("*.py"))]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in FILES
    if "\n@command(" in (text := path.read_text()) and '__name__ == "__main__"' in text
]
SLEEPER = """
import sys, time
from train.record.command import command

@command("python sleeper.py", "Sleeps.", lambda parser: None, name="sleeper")
def main(options):
    print("asleep", flush=True)
    time.sleep(60)
    return 0

sys.exit(main(sys.argv[1:]))
"""


def _run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = ROOT / name.replace(".", "/")
    found = importlib.import_module(f"{name}.__main__" if module.is_dir() else name).main
    words = [[], *([each] for each in (found.commands if isinstance(found, CommandGroup) else ()))]
    for word in words:
        with pytest.raises(SystemExit) as end:
            found([*word, "--help"])
        assert end.value.code == 0
        assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train/main.py", "yamls/smoke.yaml", "training.clip=1"], "training.clip"),
        (["-m", "launch.plan", "yamls/none.yaml"], "yamls/none.yaml"),
        (["-m", "launch.submit", "--on", "slurm"], "RECIPE"),
        (["-m", "launch.restart"], "no COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], named: str) -> None:
    ended = _run(*words)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and named in ended.stderr


def test_a_mistake_is_written_once_by_many_ranks_and_by_each_with_impossible_variables() -> None:
    words = ["train/main.py", "yamls/smoke.yaml", "training.clip=1"]
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    other = _run(*words, RANK="1", LOCAL_RANK="1", **ranks)
    assert other.returncode == 2 and other.stderr == ""
    assert _run(*words, RANK="0", LOCAL_RANK="0", **ranks).stderr.count("\n") == 1
    assert "is impossible" in _run(*words, RANK="7", LOCAL_RANK="1", **ranks).stderr


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=pipe, stderr=pipe
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"asleep\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b"sleeper: interrupted\n"


def test_figures_are_written_as_json_beside_the_printed_text(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["-m", "launch.plan", "yamls/smoke.yaml", "--gpus", "1", "--json"]
    ended = _run(*words, str(file))
    assert ended.returncode == 0 and "memory" in ended.stdout and ended.stderr == ""
    assert json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    refused = _run(*words, str(tmp_path / "none/plan.json"))
    assert refused.returncode == 2 and refused.stdout == "" and "--json" in refused.stderr


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("none/page.html", "none is not a folder; create it first"),
        ("", " is a folder; give a file"),
        (
            "/proc/page.html",
            "--html: /proc/page.html can't be written (No such file or directory); give a file",
        ),
    ],
)
def test_a_page_that_can_not_be_written_is_refused_before_the_work(
    file: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--html", type=Path)

    @command("page", "makes a page", arguments)
    def main(options: Namespace) -> int:
        raise AssertionError("the work has begun")

    assert main(["--html", str(tmp_path / file)]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_json_logs_are_objects_and_a_mistake_is_one_of_them() -> None:
    ended = _run("train/main.py", "yamls/smoke.yaml", "training.clip=1", "--json-logs")
    said = json.loads(ended.stderr)
    assert ended.returncode == 2 and said["level"] == "error" and said["rank"] == 0
    assert "training.clip" in said["message"]


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", nargs="?")


def test_a_group_runs_the_command_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @command("group one", "one", _arguments, json="figures", file="file")
    def one(options: Namespace) -> Figures:
        if options.file == "bad":
            raise UserError("is bad", key="key")
        return Figures({"file": options.file}, status=3)

    @command("group two", "two", _arguments, mistakes=(OSError,))
    def two(options: Namespace) -> int:
        log.get_logger("two").info("reading")
        return len(Path(options.file).read_text())

    main = CommandGroup("group", "Both.", {"one": one, "two": two})
    assert main(["one", "x", "--json", str(tmp_path / "x.json")]) == 3
    assert json.loads((tmp_path / "x.json").read_text()) == {"file": "x"}
    assert main(["one", "bad"]) == 2
    assert capsys.readouterr().err == "bad: key: is bad\n"
    assert main(["two", str(tmp_path / "none"), "--quiet"]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: No such file or directory\n"
    (tmp_path / "four").write_text("four")
    assert main(["two", str(tmp_path / "four")]) == 4
    assert capsys.readouterr().err == "reading\n"
