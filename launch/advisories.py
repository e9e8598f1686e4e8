"""Known advisories of the locked packages: `python -m launch.advisories`, or `make audit`.

pip-audit asks a vulnerability service about every package of the locks. What docs/advisories.md names has
been judged there; anything else is open. A package of which the service knows nothing is not a success.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.record import log
from train.record.command import Figures, command

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements-minimum.lock", "requirements-megablocks.lock")
PAGE = "docs/advisories.md"
TOOL = "pip-audit==2.10.1"
ADVISORY = re.compile(r"\b(?:CVE-\d{4}-\d+|PYSEC-\d{4}-\d+|GHSA(?:-\w{4}){3})\b")
OPEN_STATUS = 1
UNKNOWN_STATUS = 3

logger = log.get_logger(__name__)


class AuditError(RuntimeError):
    """The tool or its service could not be reached, or did not answer for a package; one line."""


@dataclass(frozen=True)
class LockedAdvisory:
    """An advisory that names a locked version."""

    package: str
    version: str
    names: tuple[str, ...]
    """The advisory's id and its aliases."""
    fixed_in: tuple[str, ...]
    is_judged: bool
    """Whether docs/advisories.md says why it does or doesn't reach us."""

    def __str__(self) -> str:
        fixed = f"fixed in {', '.join(self.fixed_in)}" if self.fixed_in else "no fixed version"
        state = "judged" if self.is_judged else "OPEN"
        return f"{state}: {self.package} {self.version}: {', '.join(self.names)}; {fixed}"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "locks", nargs="*", type=Path, default=[ROOT / name for name in LOCKS], help="locks (default: all)"
    )
    parser.add_argument("--osv", action="store_true", help="ask OSV (default: the package index)")
    parser.add_argument("--osv-url", help="address of a mirror of OSV; implies --osv")


@command(
    "python -m launch.advisories",
    f"Asks a vulnerability service about the locked packages. Exit status {OPEN_STATUS}: an advisory is not "
    f"judged in {PAGE}; {UNKNOWN_STATUS}: the service cannot be reached, or does not know a package.",
    add_arguments,
    json="also write what was found as JSON",
    name="advisories",
)
def main(options: Namespace) -> int | Figures:
    """Audits the locks."""
    service = ["--vulnerability-service", "osv"] if options.osv or options.osv_url else []
    if options.osv_url:
        service += ["--osv-url", options.osv_url]
    judged = judged_in((ROOT / PAGE).read_text())
    found: dict[str, list[LockedAdvisory]] = {}
    try:
        # One package first: some indexes know no advisories, which would take a request for each to find out.
        findings(_ask(_first_of(options.locks[0]), service), judged)
        for lock in options.locks:
            found[lock.name] = findings(_ask(lock.read_text(), service), judged)
    except AuditError as error:
        logger.error(f"advisories: not audited: {error}")
        return UNKNOWN_STATUS
    for name, of_lock in found.items():
        print(f"{name}: {len(of_lock)} advisories, {sum(not f.is_judged for f in of_lock)} open")
        print(*(f"  {finding}" for finding in of_lock), sep="\n", end="\n" if of_lock else "")
    is_open = any(not finding.is_judged for of_lock in found.values() for finding in of_lock)
    tree = {name: [asdict(finding) for finding in of_lock] for name, of_lock in found.items()}
    return Figures(tree, OPEN_STATUS if is_open else 0)


def judged_in(page: str) -> set[str]:
    """Returns the advisories that a page names."""
    return set(ADVISORY.findall(page))


def findings(report: dict[str, Any], judged: set[str]) -> list[LockedAdvisory]:
    """Returns the advisories in pip-audit's report, by package.

    Raises:
        AuditError: if a package was not audited, which pip-audit itself calls a success.
    """
    skipped = [entry["name"] for entry in report["dependencies"] if "skip_reason" in entry]
    if skipped:
        raise AuditError(f"the service knows nothing of {', '.join(skipped[:5])} ({len(skipped)} in all)")
    return [
        LockedAdvisory(
            package=entry["name"],
            version=entry["version"],
            names=tuple([advisory["id"], *advisory["aliases"]]),
            fixed_in=tuple(advisory["fix_versions"]),
            is_judged=not judged.isdisjoint([advisory["id"], *advisory["aliases"]]),
        )
        for entry in report["dependencies"]
        for advisory in entry["vulns"]
    ]


def _first_of(lock: Path) -> str:
    """Returns the first package of a lock, with its hashes."""
    lines = lock.read_text().splitlines()
    last = next(number for number, line in enumerate(lines) if line and not line.endswith("\\"))
    return "\n".join(lines[: last + 1]) + "\n"


def _ask(requirements: str, service: Sequence[str]) -> dict[str, Any]:
    """Runs pip-audit, in an environment of uv's own, and returns its report.

    Raises:
        AuditError: if there is no report.
    """
    uv = shutil.which("uv") or str(ROOT / ".cache/tools/bin/uv")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        tool = [uv, "tool", "run", "--quiet", "--from", TOOL, "pip-audit", "--progress-spinner", "off"]
        # The lock is complete: nothing is resolved, and nothing of it installed.
        what = ["--requirement", file.name, "--disable-pip", "--require-hashes", "--format", "json"]
        try:
            done = subprocess.run([*tool, *what, *service], capture_output=True, text=True, check=False)
        except OSError as error:
            raise AuditError(f"uv cannot be run ({error}); `make install` fetches it") from None
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        raise AuditError(f"pip-audit or its service cannot be reached ({reason})") from None
    assert isinstance(report, dict)
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
