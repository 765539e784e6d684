"""One server, one browser: Debian's chromium, driven by playwright, which downloads nothing for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.server_process import ServerProcess, running_server
from e2e.tiny import WIDE_KV, TinyModels
from playwright.sync_api import Browser, Page, expect, sync_playwright

MODEL = "<img src=x onerror=document.title='owned'>"  # a name that nobody should have
API_KEY, ADMIN_KEY = "user", "root"
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # for people to look at
WIDTHS = {1440: 1000, 390: 844}
WAIT_MS = 30_000
expect.set_options(timeout=WAIT_MS)
FLAGS = (
    "--no-sandbox",  # CI runs as root, where chromium's sandbox cannot
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="package")
def chromium() -> Path:
    """The system's chromium. Missing: a failure in CI, which installs it, else a skip that says so."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        text = "no chromium here: the page is not tested in a browser (apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    return Path(path)


@pytest.fixture(scope="package")
def browser(chromium: Path) -> Iterator[Browser]:
    """A browser with a fresh profile. Its driver runs an event loop in this thread, so it ends before other tests."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model on two devices with so little KV that a small burst makes it drop."""
    folder = TinyModels(tmp_path_factory.mktemp("tiny")).folder(
        "llama", **WIDE_KV, num_hidden_layers=6, max_position_embeddings=1024
    )
    memory = ("--devices", "cpu:2", "--num-gpu-blocks-override", "32", "--max-model-len", "480", "--restore-hold", "1")
    keys = ("--api-key", API_KEY, "--admin-key", ADMIN_KEY)
    with running_server("--model", str(folder), "--served-model-name", MODEL, *memory, *keys) as server:
        yield server


def take_screenshots(page: Page, name: str) -> None:
    """At both widths, in both colour schemes; nothing sticks out at the side."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width, height in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.emulate_media(color_scheme="light")
