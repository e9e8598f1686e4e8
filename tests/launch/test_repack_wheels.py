"""launch/repack_wheels.py: pip installs wheels packed again, whose files are as published."""

import ensurepip
import hashlib
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from launch.repack_wheels import main

FILES = {"some_text.py": b"WORDS = 'the same words again and again'\n" * 500, "tiny.py": b"ONE = 1\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one wheel, deflated."""
    made = tmp_path / "wheels"
    made.mkdir()
    facts = {
        "some_text-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: Some.Text\nVersion: 1.0\n",
        "some_text-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},{len(content)}\n"
        for name, content in (FILES | facts).items()
    )
    with zipfile.ZipFile(made / "some_text-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in (FILES | facts).items():
            wheel.writestr(name, content)
        wheel.writestr("some_text-1.0.dist-info/RECORD", record + "some_text-1.0.dist-info/RECORD,,\n")
    return made


def test_pip_installs_by_the_list(folder: Path, tmp_path: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    size, published = wheel.stat().st_size, hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements = tmp_path / "core.txt"
    requirements.write_text(f"some.text==1.0 \\\n    --hash=sha256:{published}\n")
    main(folder, [requirements])
    now = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert wheel.stat().st_size < size and now != published
    assert (folder / "core.txt").read_text() == (
        f"some.text==1.0 --hash=sha256:{now}  # packed again; as published: {published}\n"
    )
    (pip,) = Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")  # Environments made by uv have none.
    install = [sys.executable, pip / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    target = tmp_path / "target"
    subprocess.run(
        [
            *install,
            "--target",
            target,
            "--no-index",
            "--find-links",
            folder,
            "--require-hashes",
            "-r",
            folder / "core.txt",
        ],
        check=True,
    )
    assert {name: (target / name).read_bytes() for name in FILES} == FILES

    # Packing once more changes nothing.
    main(folder, [requirements])
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == now


def test_a_wheel_that_would_grow_stays(folder: Path, tmp_path: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as emptied:
        emptied.writestr("tiny.py", FILES["tiny.py"])
    before = wheel.read_bytes()
    (tmp_path / "core.txt").write_text("some_text==1.0\n")
    main(folder, [tmp_path / "core.txt"])
    assert wheel.read_bytes() == before and list(folder.glob("*.packed")) == []
    assert (
        folder / "core.txt"
    ).read_text() == f"some_text==1.0 --hash=sha256:{hashlib.sha256(before).hexdigest()}\n"
