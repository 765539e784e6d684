"""A replay in a real browser, from a file, without a network."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from states import state

from kunserve.command.replay import Event, replay_html
from kunserve.observe.frame import delta_of, frame_of

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"


def a_run() -> list[Event]:
    """Ten seconds: a drop after four, a restore after eight."""
    frames = []
    for i in range(101):
        at_s = 5 + i / 10
        is_dropped = 40 <= i < 80
        scene = state(at_s, is_dropped=is_dropped, used=20, waiting=i % 7)
        scene["transitions"] = [t for t in transitions() if t["started_s"] <= at_s]
        frames.append(frame_of(scene, model=HOSTILE, rates={"tok_s": float(i)}))
    return [("snapshot", frames[0]), *(("delta", delta_of(a, b)) for a, b in pairwise(frames))]


def transitions() -> list[dict[str, Any]]:
    drop = state(is_dropped=True)["transitions"][0] | {"started_s": 9.0}
    return [drop, drop | {"kind": "restore", "started_s": 13.0, "old_groups": (2,), "new_groups": (3, 4)}]


@pytest.mark.parametrize("width", [1440, 390])
def test_a_run_is_played_paused_and_sought(browser: Browser, tmp_path: Path, width: int) -> None:
    path = tmp_path / "run.html"
    path.write_text(replay_html(a_run()), encoding="utf-8")
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme="dark")
    page = context.new_page()
    urls: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(path.as_uri())
    expect(page.locator("#play")).to_have_text("Pause")  # it plays by itself
    expect(page.locator("#time")).not_to_have_text("0:00 of 0:10")
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_text("Play")

    seek = page.locator("#seek")
    seek.fill("6")
    expect(page.locator("#time")).to_have_text("0:06 of 0:10")
    expect(page.locator('.lane[data-stages="2"]')).to_have_count(1)
    expect(page.locator(".cell.kv[data-unit]")).to_have_count(6)
    expect(page.locator("#figure-tok")).to_have_text("60")
    expect(page.locator(".transition")).to_have_count(1)
    label = page.locator(".chart .canvas").first.get_attribute("aria-label")
    assert label is not None and "▼ drop, ▲ restore" in label  # charts show the whole run
    seek.focus()
    page.keyboard.press("Home")
    expect(page.locator(".lane")).to_have_count(2)
    expect(page.locator(".transition")).to_have_count(0)
    page.keyboard.press("End")
    expect(page.locator(".transition")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.locator("#model")).to_have_text(HOSTILE)
    assert page.locator("#talk, #burst, img").count() == 0 and page.title() == "KunServe: a recorded run"
    assert (urls, complaints) == ([path.as_uri()], [])
    context.close()
