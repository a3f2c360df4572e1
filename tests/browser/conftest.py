"""A running app and a browser. The app runs in a process of its own, on a model made small from config."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.chromium import FLAGS, find_chromium

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_served(url: str, process: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()
    while time.monotonic() - began < START_TIMEOUT_S:
        assert process.poll() is None, "the app ended before it served"
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return time.monotonic() - began
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url} in {START_TIMEOUT_S} s")


@pytest.fixture(scope="session")
def app_url() -> Iterator[str]:
    """The real `app.py`, as a person starts it."""
    port = free_port()
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_until_served(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("NO CHROMIUM: browser tests skipped; run `python -m tests.browser.chromium`", allow_module_level=False)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, app_url: str) -> Iterator[Page]:
    """A fresh visitor on the page; a dialog or a page error fails the test."""
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    visitor = context.new_page()
    visitor.set_default_timeout(45_000)
    problems: list[str] = []
    visitor.on("dialog", lambda d: (problems.append(f"dialog: {d.message}"), d.dismiss()))
    visitor.on("pageerror", lambda e: problems.append(f"page error: {e}"))
    visitor.goto(app_url)
    visitor.wait_for_selector("#send:not([disabled])")
    visitor.wait_for_selector("#fused-head .column-head")
    yield visitor
    context.close()
    assert not problems, problems
