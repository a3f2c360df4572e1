"""Find a Chromium for the browser tests, or install one: `python -m tests.browser.chromium`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def find_chromium() -> str | None:
    """Path of a browser: $CHROMIUM, an installed one, or Playwright's own."""
    given = os.environ.get("CHROMIUM")
    if given and Path(given).is_file():
        return given
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    own = sorted((Path.home() / ".cache" / "ms-playwright").glob("chromium*/chrome-linux*/*"))
    return next((str(p) for p in own if p.name in ("chrome", "headless_shell", "chrome-headless-shell") and os.access(p, os.X_OK)), None)


def _try(command: list[str]) -> bool:
    print("+", " ".join(command), flush=True)
    try:
        return subprocess.run(command, check=False, timeout=600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install_chromium() -> str | None:
    """Playwright's own browser, else the distribution's package when this is root; None when neither came."""
    _try([sys.executable, "-m", "playwright", "install", "chromium"])
    if find_chromium() is None and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        _try(["apt-get", "update"])
        _try(["apt-get", "install", "-y", "--no-install-recommends", "chromium"])
    return find_chromium()


def main() -> None:
    """Make sure there is a browser; without one the browser tests are skipped, and this says so."""
    path = find_chromium() or install_chromium()
    if path is None:
        print("No Chromium: browser tests will be SKIPPED. Install the package `chromium`, or set CHROMIUM=/path/to/it.")
    else:
        print(f"browser tests use {path}")


if __name__ == "__main__":
    main()
