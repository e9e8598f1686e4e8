"""launch/install.sh and launch/wheels.sh: what they refuse, and an installation without a network."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("launch/install.sh", "launch/wheels.sh", "launch/packages.sh")
USAGE = "bash launch/wheels.sh [--core | --stores] DIR"
STACK = "minimum" if sys.version_info < (3, 12) else "default"
ENVIRONMENT = {"minimum": ".venv-minimum", "default": ".venv"}[STACK]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with what installing reads."""
    made = tmp_path / "a checkout"
    (made / "launch").mkdir(parents=True)
    (made / "train").mkdir()
    for name in (*SCRIPTS, "pyproject.toml", *(path.name for path in ROOT.glob("*.lock"))):
        (made / name).write_text((ROOT / name).read_text())
    return made


def system_python(folder: Path, torch: str | None = None) -> Path:
    """Makes an environment that stands for a system's Python, with something that calls itself torch."""
    venv.create(folder, symlinks=True)
    if torch is not None:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "torch").mkdir()
        (packages / "torch/__init__.py").write_text(f"__version__ = {torch!r}\n")
        facts = packages / f"torch-{torch}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    return folder / "bin/python"


def call(checkout: Path, script: str, *words: str, **variables: str) -> tuple[int, str, str]:
    """Calls a script with no network to be had from pip and uv."""
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9", "UV_OFFLINE": "1", "PIP_NO_INPUT": "1"}
    result = subprocess.run(
        ["bash", f"launch/{script}", *words],
        cwd=checkout,
        env=os.environ | {"STACK": STACK} | offline | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        (
            "install.sh",
            ["--cores"],
            "--cores is not known; the options are --core, --system-torch and --wheels DIR",
        ),
        (
            "install.sh",
            ["--wheels"],
            "--wheels:  is not a folder of wheels; make wheels WHEELS=DIR makes one",
        ),
        (
            "install.sh",
            ["--wheels", "x"],
            "--wheels: x is not a folder of wheels; make wheels WHEELS=DIR makes one",
        ),
        ("wheels.sh", [], USAGE),
        ("wheels.sh", ["--full", "x"], USAGE),
        ("wheels.sh", ["x", "y"], f"y is not known; {USAGE}"),
    ],
)
def test_mistakes_are_one_line(checkout: Path, script: str, words: list[str], line: str) -> None:
    assert call(checkout, script, *words) == (2, "", f"launch/{script}: {line}\n")
    assert not (checkout / ENVIRONMENT).exists()


def test_an_unknown_stack_is_refused(checkout: Path) -> None:
    line = "launch/install.sh: STACK=newest is not known; it is default or minimum\n"
    assert call(checkout, "install.sh", STACK="newest") == (2, "", line)


def test_a_system_without_torch_or_with_an_old_one_is_refused(checkout: Path, tmp_path: Path) -> None:
    bare = str(system_python(tmp_path / "bare"))
    status, _, errors = call(checkout, "install.sh", "--system-torch", PYTHON=bare)
    assert status == 2 and errors.count("\n") == 1
    assert f" with torch: {bare}; set PYTHON=" in errors
    old = str(system_python(tmp_path / "old", "2.6.1+cu124"))
    line = f"launch/install.sh: --system-torch: {old} has torch 2.6.1+cu124; 2.7 or newer is needed\n"
    assert call(checkout, "install.sh", "--system-torch", PYTHON=old) == (2, "", line)


@pytest.mark.slow
def test_an_installation_without_a_network(checkout: Path, tmp_path: Path) -> None:
    """No wheels are needed to see where torch comes from, and that a second call has nothing to do."""
    python = str(system_python(tmp_path / "system", "2.11.0a0+vendor"))
    wheels = checkout / "wheels"
    wheels.mkdir()
    (wheels / "core.txt").write_text("# no package\n")
    (wheels / "python").write_text("{}.{}\n".format(*sys.version_info))
    line = f"launch/install.sh: --wheels: {wheels} holds only the core; add --core\n"
    assert call(checkout, "install.sh", "--wheels", "wheels", PYTHON=python) == (2, "", line)

    status, output, errors = call(checkout, "install.sh", "--wheels", "wheels", "--core", PYTHON=python)
    assert status == 0, errors
    assert f"install: keeping torch 2.11.0a0+vendor of {python}" in output
    own = checkout / ENVIRONMENT / "bin/python"
    code = "import sys, torch; print(torch.__version__, sys.prefix)"
    seen = subprocess.run([own, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen == f"2.11.0a0+vendor {checkout / ENVIRONMENT}\n"
    assert (checkout / ENVIRONMENT / "bin/composer").read_text().startswith(f"#!{own}\n")

    assert call(checkout, "install.sh", "--wheels", "wheels", "--core", PYTHON=python) == (0, "", "")
    assert call(checkout, "install.sh") == (0, "", "")  # The options hold.
    (wheels / "core.txt").write_text("nothing==1 --hash=sha256:" + 64 * "0" + "\n")
    status, output, errors = call(checkout, "install.sh")
    assert (
        status == 1
        and "keeping torch" in output
        and "No matching distribution found for nothing==1" in errors
    )


def test_the_scripts_are_sound_shell() -> None:
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", ROOT / script], check=True)
