"""The audit's answers, and the page of advisories against the locks."""

import json
import re
from pathlib import Path

import pytest

from launch import advisories
from launch.advisories import ADVISORY, LOCKS, PAGE, ROOT, AuditError, findings, judged_in, main

TABLE = re.compile(
    r"^\| (\w[\w-]*) \| ([\d.]+|-) \| ([\d.]+|-) \| (.+) \| (.+) \| (.+) \| (.*) \|$", re.MULTILINE
)


def report(*advisories: str, package: str = "torch") -> dict[str, object]:
    """Returns a report in the form of pip-audit 2.10."""
    of_package = {
        "name": package,
        "version": "2.7.0",
        "vulns": [
            {"id": name, "aliases": ["GHSA-aaaa-bbbb-cccc"], "fix_versions": ["2.10"], "description": "text"}
            for name in advisories
        ],
    }
    return {"dependencies": [{"name": "numpy", "version": "2.1.3", "vulns": []}, of_package], "fixes": []}


def test_an_advisory_is_open_until_the_page_names_it_or_an_alias() -> None:
    for page, is_judged in (("CVE-2026-1", True), ("see GHSA-aaaa-bbbb-cccc.", True), ("CVE-2026-12", False)):
        (finding,) = findings(report("CVE-2026-1"), judged_in(page))
        assert finding.is_judged is is_judged, page
        assert ("OPEN" in str(finding)) is not is_judged
        assert "torch 2.7.0: CVE-2026-1, GHSA-aaaa-bbbb-cccc; fixed in 2.10" in str(finding)
    assert findings(report(), set()) == []


def test_what_was_not_audited_is_not_a_success() -> None:
    skipped = {"dependencies": [{"name": "torch", "skip_reason": "not found"}], "fixes": []}
    with pytest.raises(AuditError, match=r"knows nothing of torch \(1 in all\)"):
        findings(skipped, set())


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for uv, which keeps what it was asked and prints the file `answer`."""
    program = tmp_path / "uv"
    program.write_text(
        '#!/bin/bash\ncd "$(dirname "$0")"\necho "$@" >>asked\n'
        'while [ "$1" != --requirement ]; do shift; done\ncat "$2" >>requirements\ncat answer\n'
        'echo "a trace" >&2\necho "no such host" >&2\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_every_lock_is_asked_about_and_the_status_says_what_was_found(
    tool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tool / "answer").write_text(json.dumps(report()))
    assert main([]) == 0
    assert [f"{name}: 0 advisories, 0 open" for name in LOCKS] == capsys.readouterr().out.splitlines()
    asked = (tool / "requirements").read_text()
    assert all((ROOT / name).read_text() in asked for name in LOCKS)
    (tool / "answer").write_text(json.dumps(report("CVE-2026-24747", "CVE-1999-1")))
    assert main([str(ROOT / LOCKS[0]), "--json", str(tool / "found.json")]) == advisories.OPEN_STATUS
    printed = capsys.readouterr().out
    assert "2 advisories, 1 open" in printed and "OPEN: torch 2.7.0: CVE-1999-1" in printed
    found = json.loads((tool / "found.json").read_text())[LOCKS[0]]
    assert [finding["is_judged"] for finding in found] == [True, False]


def test_a_service_that_cannot_be_reached_is_one_line_after_one_package(
    tool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tool / "answer").write_text("")
    assert main(["--osv-url", "http://127.0.0.1:9"]) == advisories.UNKNOWN_STATUS
    shown = capsys.readouterr().err
    assert shown == "advisories: not audited: pip-audit or its service cannot be reached (no such host)\n"
    asked = (tool / "asked").read_text()
    assert asked.count("\n") == 1 and "--vulnerability-service osv --osv-url http://127.0.0.1:9" in asked
    assert (tool / "requirements").read_text().count("==") == 1


def test_the_page_is_of_the_locks_and_gives_a_reason_for_each() -> None:
    locked = [
        dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)) for name in LOCKS
    ]
    page = (ROOT / PAGE).read_text()
    rows = TABLE.findall(page)
    assert len(rows) > 10
    for package, default, minimum, names, fixed, what, reason in rows:
        assert (default, minimum) == tuple(lock.get(package, "-") for lock in locked[:2]), package
        assert ADVISORY.search(names) or names == "none named", names
        assert fixed and what and reason, names
    for package, versions in re.findall(
        r"^\| (\w[\w-]*) \| ([\d., ]+) \| CVE[^|]+ \| [^|]+ \|$", page, re.MULTILINE
    ):
        assert set(versions.split(", ")) == {lock[package] for lock in locked[:2]}, package
    assert {"kernels"}.isdisjoint(name for lock in locked for name in lock)
