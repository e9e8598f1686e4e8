"""Rank 0 logs, others only on request; text, quiet, timestamps and JSON; the run's progress on stdout."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.record import log

ROOT = Path(__file__).resolve().parents[3]
logger = log.get_logger("tests.log")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    log.configure()


def test_messages_go_to_stderr_and_progress_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("a message")
    log.progress.info("run folder runs/x")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("run folder runs/x\n", "a message\n")


def test_only_rank_0_logs_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    logger.warning("of rank 0")
    log.progress.info("of rank 0")
    logger.warning("of every rank", extra=log.ALL_RANKS)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "of every rank\n")


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(quiet=True)
    assert log.is_quiet() and log.options() == ["--quiet"]
    logger.info("a message")
    log.progress.info("batch 1/2")
    logger.warning("a warning")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "a warning\n")


def test_only_warnings_ends_with_its_block(capsys: pytest.CaptureFixture[str]) -> None:
    with log.only_warnings():
        logger.info("hidden")
        logger.warning("a warning")
        with log.only_warnings():
            pass
        logger.info("hidden still")
    logger.info("a message")
    assert capsys.readouterr().err == "a warning\na message\n"


def test_json_logs_take_the_libraries_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Libraries of other tests left theirs.
    log.configure(as_json=True)
    assert log.options() == ["--json-logs"]
    logger.error("two\nlines")
    logging.getLogger("other.package").warning("theirs")
    log.progress.info("batch 1/2")
    shown = capsys.readouterr()
    said = [json.loads(line) for line in shown.err.splitlines()]
    assert [(line["level"], line["logger"], line["message"]) for line in said] == [
        ("error", "tests.log", "two\nlines"),
        ("warning", "other.package", "theirs"),
    ]
    assert json.loads(shown.out)["message"] == "batch 1/2"


def test_json_logs_take_warnings_too() -> None:
    # In its own process: pytest records warnings itself.
    code = "import warnings; from train.record import log; log.configure(as_json=True); warnings.warn('old')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = json.loads(ended.stderr)
    assert said["logger"] == "py.warnings" and "old" in said["message"]


def test_timestamps_stand_before_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(timestamps=True)
    logger.warning("late")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING late\n", capsys.readouterr().err)
