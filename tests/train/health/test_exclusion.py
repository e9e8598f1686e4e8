"""Hosts that computed wrongly are recorded, and refused at the next start."""

from pathlib import Path

import pytest

from launch.restart.ending import explain
from launch.restart.look_back import status_of
from train.health.exclusion import EXCLUDED_FILE, excluded_hosts, refuse_excluded, report_corruption
from train.health.heartbeat import clear_records
from train.recipe.exit_status import UNFIT_STATUS
from train.recipe.topology import Topology

SUSPECT = Topology(rank=1, world_size=2)


def report(folder: Path, rank: int, suspects: dict[int, str], *, is_persistent: bool = True) -> None:
    line = "CORRUPTION: batch 5"
    report_corruption(folder, Topology(rank, 2), 4, line, suspects, is_persistent=is_persistent)


def test_a_host_that_computed_wrongly_is_refused_until_its_record_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEGRAIN_HOST", "n7")
    refuse_excluded(tmp_path, SUSPECT)
    for rank in (0, 1):
        report(tmp_path, rank, {1: "n7"})
    assert list(excluded_hosts(tmp_path)) == ["n7"]
    ending = explain(UNFIT_STATUS, tmp_path)
    assert (ending.kind, ending.rank, ending.host) == ("unfit", 1, "n7") and "batch 5 on n7" in ending.line
    assert status_of(tmp_path) == UNFIT_STATUS
    clear_records(tmp_path)
    with pytest.raises(SystemExit, match=str(UNFIT_STATUS)):
        refuse_excluded(tmp_path, SUSPECT)
    assert "n7 is excluded: CORRUPTION: batch 5" in explain(UNFIT_STATUS, tmp_path).line
    assert status_of(tmp_path) == UNFIT_STATUS
    monkeypatch.setenv("FINEGRAIN_HOST", "n8")
    refuse_excluded(tmp_path, SUSPECT)
    (tmp_path / EXCLUDED_FILE).unlink()
    monkeypatch.setenv("FINEGRAIN_HOST", "n7")
    refuse_excluded(tmp_path, SUSPECT)


@pytest.mark.parametrize("suspects", [{0: "n7", 1: "n8"}, {}], ids=["two hosts", "none"])
def test_no_host_is_excluded_that_is_one_of_several_suspects(
    tmp_path: Path, suspects: dict[int, str]
) -> None:
    for rank in (0, 1):
        report(tmp_path, rank, suspects)
    assert not excluded_hosts(tmp_path)
    assert explain(UNFIT_STATUS, tmp_path).host in ("n7, n8", "")


def test_a_transient_error_is_recorded_and_blames_nobody(tmp_path: Path) -> None:
    report(tmp_path, 0, {0: "n7"}, is_persistent=False)
    assert not excluded_hosts(tmp_path) and not list(tmp_path.glob("failed-*"))
    (tmp_path / EXCLUDED_FILE).write_text("[torn")
    assert excluded_hosts(tmp_path) == {}
