"""The page in a real browser, as a person uses it: with a key, by keyboard, through a burst."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from e2e.server_process import ServerProcess
from playwright.sync_api import Browser, Page, Route, expect

from browser.conftest import ADMIN_KEY, API_KEY, MODEL, WAIT_MS, take_screenshots

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>"
WATCH_LENGTH = """() => {
  window.lengths = new Set();
  const list = document.getElementById("messages");
  const look = () => lengths.add(list.textContent.length);
  new MutationObserver(look).observe(list, { subtree: true, childList: true, characterData: true });
}"""


@dataclass
class Visit:
    """A page, everything it asked for and everything it complained of."""

    page: Page
    urls: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def visit(browser: Browser, server: ServerProcess) -> Iterator[Visit]:
    """One visit for all tests of this file: the key is given once."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, color_scheme="light")
    context.set_default_timeout(WAIT_MS)
    visit = Visit(context.new_page())
    visit.page.on("request", lambda request: visit.urls.append(request.url))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    response = visit.page.goto(server.url)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    expect(visit.page.locator("#connection")).to_have_text("○ key needed")
    [refused] = visit.complaints
    assert "401" in refused
    visit.complaints.clear()
    expect(visit.page.locator("#api-key")).to_be_focused()
    visit.page.keyboard.type(API_KEY)
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#connection")).to_have_text("● live")
    yield visit
    context.close()


def test_it_shows_the_devices_and_groups(visit: Visit) -> None:
    page = visit.page
    for name in ("cpu:0", "cpu:1"):
        device = page.locator(f'[data-device="{name}"].device')
        expect(device.locator(".bar")).to_have_attribute(
            "aria-label", f"{name}: {device.locator('.quiet').inner_text()}"
        )
        expect(device.locator(".quiet")).to_contain_text("(layers 0–5) · KV 0 MiB of")
        assert device.locator("[data-unit]").count() == 8  # embedding, six layers, head
    assert page.locator(".lane").count() == 2
    expect(page.locator("#policy")).to_have_text("policy: drop")
    expect(page.locator("#model")).to_have_text(MODEL)  # as text


def test_a_chat_answer_streams_and_nothing_hostile_is_html(visit: Visit) -> None:
    page = visit.page
    page.evaluate(WATCH_LENGTH)
    page.locator("#prompt").fill(HOSTILE)
    page.locator("#prompt").press("Enter")
    expect(page.locator(".message.assistant:not(.writing) p")).not_to_be_empty()
    assert page.evaluate("lengths.size") > 3  # it came in pieces
    expect(page.locator(".message.user p")).to_have_text(HOSTILE)
    assert page.locator(".message .error").count() == 0

    def answer(route: Route) -> None:
        events = ("<img src=x onerror=alert(1)>", "</p><script>alert(2)</script>")
        chunks = [f'data: {{"choices":[{{"delta":{{"content":"{text}"}}}}]}}\n\n' for text in events]
        route.fulfill(content_type="text/event-stream", body="".join(chunks) + "data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    page.locator("#prompt").fill("again")
    page.locator("#send").click()
    said = page.locator(".message.assistant p").last
    expect(said).to_have_text("<img src=x onerror=alert(1)></p><script>alert(2)</script>")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda _: None)  # no answer comes
    page.locator("#prompt").fill("once more")
    page.locator("#send").click()
    page.locator("#stop").click()
    expect(page.locator(".message .error")).to_have_text("stopped")
    page.unroute("**/v1/chat/completions")
    assert page.locator("main img, main script, header img, .message b b").count() == 0
    assert page.title() == "KunServe"


def test_a_full_conversation_says_so_and_a_new_one_knows_nothing_of_it(visit: Visit) -> None:
    page = visit.page
    asked: list[Any] = []

    def answer(route: Route) -> None:
        body: Any = route.request.post_data_json
        asked.append(body["messages"])
        chunk = 'data: {"choices":[{"delta":{"content":"and on"},"finish_reason":"length"}]}\n\n'
        route.fulfill(content_type="text/event-stream", body=chunk + "data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    for text in ("first", "second"):
        page.locator("#prompt").fill(text)
        page.locator("#send").click()
        expect(page.locator(".message .quiet").last).to_contain_text("cut off")
        page.locator("#fresh").click()
        expect(page.locator(".message")).to_have_count(0)
        expect(page.locator("#prompt")).to_be_focused()
        expect(page.locator("#fresh")).to_be_hidden()
    page.unroute("**/v1/chat/completions")
    assert [messages[-1]["content"] for messages in asked] == ["first", "second"]
    assert len(asked[1]) == 1


def test_everything_is_reached_by_keyboard(visit: Visit) -> None:
    page = visit.page
    page.locator("body").evaluate("document.activeElement.blur()")
    reached: list[str] = []
    while reached.count("messages") < 2 and len(reached) < 60:  # once around
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    wanted = ["messages", "prompt", "send", "burst-requests", "burst-rate", "burst-in", "burst-out", "admin-key"]
    reached = reached[reached.index("messages") :]
    assert [name for name in reached if name in (*wanted, "burst-start")][:9] == [*wanted, "burst-start"]
    page.locator("#burst-start").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_burst_makes_memory_of_weights_and_gives_it_back(visit: Visit) -> None:
    page = visit.page
    for name, value in {"requests": "16", "rate": "200", "in": "32", "out": "100"}.items():
        page.locator(f"#burst-{name}").fill(value)
    page.locator("#admin-key").fill("wrong")
    page.locator("#admin-key").press("Enter")
    expect(page.locator("#burst-state")).to_contain_text("The admin key is missing or wrong")
    page.locator("#admin-key").fill(ADMIN_KEY)
    page.locator("#admin-key").press("Enter")
    expect(page.locator('.transition[data-kind="drop"]')).to_have_count(1)
    expect(page.locator('.lane[data-stages="2"]')).to_have_count(1)  # two lanes are one chain
    expect(page.locator(".cell.kv[data-unit]").first).to_be_attached()
    expect(page.locator("#given")).to_contain_text("of weights are KV now: room for")
    expect(page.locator(".chart .canvas").first).to_have_attribute("aria-label", re.compile("▼ drop"))
    take_screenshots(page, "drop")
    expect(page.locator("#burst-state")).to_contain_text("16 completed in")
    expect(page.locator('.transition[data-kind="restore"][data-outcome="done"]')).to_have_count(1)
    expect(page.locator(".lane")).to_have_count(2)
    expect(page.locator(".cell.kv[data-unit]")).to_have_count(0)
    expect(page.locator("#given")).to_have_text("All devices hold all their weights.")
    expect(page.locator(".chart .canvas").first).to_have_attribute("aria-label", re.compile("▲ restore"))
    drop = page.locator('.transition[data-kind="drop"]')
    for step in ("boundary", "remap", "exchange", "committed after"):
        expect(drop).to_contain_text(step)
    take_screenshots(page, "restored")


def test_a_page_opened_after_a_burst_still_shows_it(visit: Visit) -> None:
    page = visit.page
    page.reload()
    expect(page.locator("#connection")).to_have_text("● live")
    chart = page.locator("#charts .chart", has_text="Tokens per second")
    over = chart.locator(".u-over").bounding_box()
    assert over is not None
    shown = set()
    for step in range(50):
        page.mouse.move(over["x"] + over["width"] * (step + 0.5) / 50, over["y"] + over["height"] / 2)
        shown.add(chart.locator(".key b").inner_text())
    assert len(shown - {"0", "–"}) > 1  # speeds of a time before the page was there
    page.locator("#admin-key").fill(ADMIN_KEY)


def test_a_burst_can_be_cancelled(visit: Visit) -> None:
    page = visit.page
    page.locator("#burst-requests").fill("500")
    page.locator("#burst-rate").fill("0.1")
    page.locator("#burst-start").click()
    expect(page.locator("#figure-running")).to_have_text("1")
    expect(page.locator("#burst-cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#burst-state")).to_contain_text("Cancelled")
    expect(page.locator("#figure-running")).to_have_text("0")


def test_nothing_left_the_machine_and_nothing_went_wrong(visit: Visit, server: ServerProcess) -> None:
    assert len(visit.urls) > 15
    assert [url for url in visit.urls if not url.startswith(f"{server.url}/")] == []
    refused = [complaint for complaint in visit.complaints if "401" in complaint]  # the wrong admin key
    assert len(refused) == 1 and visit.complaints == refused
