"""Pages in a real browser."""

import shutil
import subprocess
from pathlib import Path

import pytest


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here to open the page in")


def opened(page: Path, view: str = "") -> tuple[str, str]:
    """The page in a browser after its scripts have run, and the browser's complaints."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=5000",
    ]
    options += ["--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [browser(), *options, f"{page.as_uri()}{view}"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
