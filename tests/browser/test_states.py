"""What the page says in each state of a server, in a real browser: loading, running, a drop in progress, overload."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from states import drop_transition, gone, state

from browser.conftest import WAIT_MS, take_screenshots
from browser.scripted_server import ScriptedServer, scripted_server

MIB = 1 << 20
STARTED_S = 20.0


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, color_scheme="light")
    context.set_default_timeout(WAIT_MS)
    yield context.new_page()
    context.close()


@pytest.fixture
def server(chromium: Path) -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def live(page: Page, server: ScriptedServer) -> Page:
    """The page of a server that is ready."""
    server.ready()
    page.goto(server.url)
    expect(page.locator("#connection")).to_have_text("● live")
    return page


def drop(**more: Any) -> dict[str, Any]:
    """A drop that began after 20 seconds; the wait for the step boundary takes four."""
    seconds = {"boundary": 4.0, "remap": 0.002, "committed": 4.002}
    running = {"outcome": "running", "planned_bytes": 28 * MIB, "seconds": seconds, "exchange_bytes": 0}
    return drop_transition(STARTED_S) | running | more


BEFORE_COMMIT = {"new_groups": (), "epoch": None, "weight_bytes": 0}


def test_a_page_opened_while_the_model_loads_shows_progress_and_then_itself(page: Page, server: ScriptedServer) -> None:
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    response = page.goto(server.url)
    assert response is not None and response.status == 503
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    expect(page.locator("#connection")).to_have_text("○ loading")
    expect(page.locator("#loading-text")).to_have_text("starting")
    expect(page.locator("#loading-share")).not_to_have_attribute("value", "0")  # nobody knows how far it is
    server.progress.update("loading weights", 0.437)
    expect(page.locator("#loading-text")).to_have_text("loading weights: 43 %")
    assert page.locator("#loading-share").evaluate("bar => bar.value") == 0.437
    expect(page.locator("#main")).to_be_hidden()
    take_screenshots(page, "loading")
    server.ready()
    expect(page.locator("#connection")).to_have_text("● live")
    expect(page.locator("#loading")).to_be_hidden()
    expect(page.locator(".lane")).to_have_count(2)
    assert complaints == []


def test_a_server_that_fails_to_load_is_said_to_have_stopped_and_one_started_anew_is_shown(
    page: Page, server: ScriptedServer
) -> None:
    page.goto(server.url)
    expect(page.locator("#loading-text")).to_have_text("starting")
    server.stop()
    expect(page.locator("#loading-text")).to_contain_text("its log says why")
    expect(page.locator("#connection")).to_have_text("✕ stopped")
    expect(page.locator("#loading-share")).to_be_hidden()
    with scripted_server(server.port) as anew:
        expect(page.locator("#loading-text")).to_have_text("starting")
        anew.ready()
        expect(page.locator("#connection")).to_have_text("● live")


def test_a_page_that_was_open_follows_a_server_that_is_started_anew(live: Page, server: ScriptedServer) -> None:
    server.stop()
    expect(live.locator("#connection")).to_contain_text("reconnecting")
    with scripted_server(server.port) as anew:
        anew.progress.update("loading weights", 0.5)
        expect(live.locator("#loading-text")).to_have_text("loading weights: 50 %")
        expect(live.locator("#main")).to_be_hidden()
        anew.ready()
        expect(live.locator("#main")).to_be_visible()


def test_a_running_server_says_how_many_microbatches_are_in_flight_and_ahead(
    live: Page, server: ScriptedServer
) -> None:
    shown = state(2.0, used=4)
    for group, num_in_flight in zip(shown["groups"], (2, 1), strict=True):
        group["microbatches_in_flight"] = num_in_flight
    server.show(shown)
    lanes = live.locator(".lane")
    expect(lanes.nth(0)).to_contain_text("1 of 1 microbatch in flight, 1 planned ahead")
    expect(lanes.nth(0).locator(".flow i")).to_have_count(1)
    expect(lanes.nth(1)).to_contain_text("1 of 1 microbatch in flight ·")
    chain = state(3.0, is_dropped=True, used=4)
    chain["groups"][0]["microbatches_in_flight"] = 3
    server.show(chain)
    expect(lanes).to_contain_text(["2 of 2 microbatches in flight, 1 planned ahead"])
    take_screenshots(live, "running")


def test_a_drop_in_progress_says_what_it_does_and_how_much_becomes_kv(live: Page, server: ScriptedServer) -> None:
    item, chart = live.locator(".transition"), live.locator(".chart .canvas").first
    server.show(state(21.0, used=30, transitions=[drop(step="boundary", seconds={}, **BEFORE_COMMIT)]))
    expect(item).to_contain_text("Waiting for the step boundary: then 28 MiB of weights become KV.")
    expect(item).to_contain_text("groups 0 and 1 merge")
    expect(item.locator(".current")).to_have_text("step boundary …")
    expect(chart).to_have_attribute("aria-label", f"{chart_text('1,024', '960')}; marked: ▼ drop …")
    take_screenshots(live, "dropping")
    server.show(state(24.0, used=30, transitions=[drop(step="remap", seconds={"boundary": 4.0}, **BEFORE_COMMIT)]))
    expect(item).to_contain_text("Remapping: 28 MiB of weights become KV.")
    expect(item).to_contain_text("step boundary 4.00 s")
    server.show(state(24.1, is_dropped=True, used=30, transitions=[drop(step="exchange")]))
    expect(item).to_contain_text("28 MiB of weights became KV; KV of running requests follows its layers.")
    expect(item).to_contain_text("groups 0 and 1 became group 2")
    done = drop(outcome="done", exchange_bytes=5 * MIB)
    server.show(state(25.0, is_dropped=True, used=30, transitions=[done]))
    expect(item).to_contain_text("28 MiB of weights became KV, 5.0 MiB of KV followed its layers.")
    rolled_back = drop(outcome="rolled back", seconds={"boundary": 4.0, "total": 4.1}, **BEFORE_COMMIT)
    server.show(state(26.0, used=30, transitions=[rolled_back]))
    expect(item).to_contain_text("Nothing was regrouped")
    expect(chart).to_have_attribute("aria-label", f"{chart_text('1,024', '960')}; marked: ✕ drop rolled back")


def chart_text(room: str, used: str) -> str:
    return f"KV cache, tokens: room {room}, used {used}"


def test_devices_that_do_not_do_their_work_say_so(live: Page, server: ScriptedServer) -> None:
    devices, lanes, items = live.locator(".device"), live.locator(".lane"), live.locator(".transition")
    expect(lanes).to_have_count(2)
    expect(devices.first).to_have_attribute("data-state", "ok")
    expect(live.locator(".state:visible")).to_have_count(0)
    suspect = state(2.0, used=4)
    suspect["devices"][1]["state"] = "suspect"
    server.show(suspect)
    expect(devices.nth(1).locator(".state")).to_have_text("⚠ suspect")
    expect(devices.nth(1).locator(".bar")).to_have_attribute("aria-label", re.compile("^cpu:1, ⚠ suspect: weights"))
    expect(devices.nth(1).locator(".bar")).to_have_css("outline-style", "dashed")
    expect(lanes.nth(1).locator(".stage .state")).to_have_text("⚠ suspect")
    take_screenshots(live, "suspect")
    committed = {"outcome": "done", "exchange_bytes": 0, "weight_bytes": 0, "seconds": {"committed": 0.1, "total": 0.1}}
    lose = drop_transition(2.5) | committed | {"kind": "lose", "old_groups": (1,), "new_groups": ()}
    server.show(gone(state(3.0, used=4, transitions=[lose]), 1))
    expect(lanes).to_have_count(1)
    expect(devices.nth(1)).to_contain_text("✕ lostIt was declared dead after failures: it holds nothing")
    expect(devices.nth(1).locator(".cell:visible")).to_have_count(0)
    expect(live.locator("#given")).to_have_text("All devices that serve hold all their weights.")
    for words in ("† device loss", "group 1 ended", "A device was lost, and its requests started over."):
        expect(items).to_contain_text(words)
    take_screenshots(live, "lost")
    add = drop_transition(4.0) | {"kind": "add", "old_groups": (), "new_groups": (), "epoch": None, "seconds": {}}
    add |= {"outcome": "running", "step": "load", "planned_bytes": 28 * MIB}
    server.show(gone(state(5.0, used=4, transitions=[lose, add]), 1, "removed"))
    expect(devices.nth(1).locator(".state")).to_have_text("− removed")
    expect(items.first).to_contain_text("A device is being taken in.")
    added = add | committed | {"epoch": 2, "new_groups": (2,), "weight_bytes": 28 * MIB}
    server.show(state(6.0, used=4, transitions=[lose, added]))
    expect(items.first).to_contain_text("group 2 began")
    expect(items.first).to_contain_text("A device was taken into service; 28 MiB of weights were loaded.")
    expect(live.locator(".state:visible")).to_have_count(0)
    expect(lanes).to_have_count(2)
    server.show(gone(gone(state(7.0), 0), 1))
    expect(lanes).to_have_count(0)


def test_the_list_and_the_charts_mark_a_drop_at_the_same_moment(page: Page, server: ScriptedServer) -> None:
    """Both at its commit, not one of them at its start: the step boundary may be seconds away."""
    server.show(state(10.0))
    server.ready()
    page.goto(server.url)
    expect(page.locator(".lane")).to_have_count(2)
    server.show(state(STARTED_S + 10, is_dropped=True, transitions=[drop(outcome="done")]))
    expect(page.locator(".transition time")).to_have_text("at 0:14")
    colours = """([selector, second]) => {
      const over = document.querySelector(selector + " .u-over"), canvas = document.querySelector(selector + " canvas");
      const plot = over.getBoundingClientRect(), all = canvas.getBoundingClientRect(), scale = canvas.width / all.width;
      const left = (plot.left - all.left + plot.width * second / 30) * scale;
      const {data} = canvas.getContext("2d").getImageData(left - 1, (plot.top - all.top + 5.5) * scale, 3, 1);
      return [0, 4, 8].map((i) => data.slice(i, i + 4).join());
    }"""

    def at(second: float) -> set[str]:
        return set(page.evaluate(colours, [".chart", second]))

    beside, waiting, commit = at(8.5), at(12.5), at(14.002)
    assert not beside & waiting and not waiting & commit  # a pale band while it waited, a line at its commit
    assert at(9.0) == beside and at(11.0) == waiting


def test_in_an_overload_the_last_times_to_first_token_stay_and_say_how_old_they_are(
    live: Page, server: ScriptedServer
) -> None:
    figure, age = live.locator("#figure-p99"), live.locator("#age-p99")
    server.metrics.recent.first_token(5.0, 0.25)
    server.show(state(6.0, used=32, waiting=40))
    expect(figure).to_have_text("250 ms")
    expect(age).to_be_empty()
    expect(figure).not_to_have_class("old")
    server.show(state(47.0, used=32, waiting=40))
    expect(age).to_have_text("42 s ago")
    expect(figure).to_have_text("250 ms")
    expect(figure).to_have_class("old")
    expect(live.locator(".queue")).to_contain_text("40 waiting")
    take_screenshots(live, "overload")
    server.metrics.recent.first_token(46.0, 41.0)
    expect(figure).to_have_text("41.0 s")
    expect(figure).not_to_have_class("old")


def test_what_the_prefix_cache_keeps_is_told_apart_from_what_is_used_and_what_is_free(
    live: Page, server: ScriptedServer
) -> None:
    figure, ever = live.locator("#figure-hits"), live.locator("#age-hits")
    expect(figure).to_have_text("–")
    expect(ever).to_be_empty()
    server.metrics.prefix_cache(100, 84)
    server.show(state(2.0, used=8, idle=16))
    expect(figure).to_have_text("84 %")
    expect(ever).to_have_text("84 % ever")
    expect(live.locator(".lane").first).to_contain_text("128 of 512 tokens of KV, 256 cached")
    device = live.locator(".device").first
    expect(device.locator(".bar")).to_have_attribute(
        "aria-label", re.compile(r"KV \S+ MiB of \S+ MiB used · \S+ MiB cached")
    )
    widths = """(cell) => [
      Number(getComputedStyle(cell, "::before").transform.slice(7).split(",")[0]),
      cell.querySelector(".cached").getBoundingClientRect().width,
      cell.getBoundingClientRect().width,
    ]"""
    live.emulate_media(reduced_motion="reduce")  # nothing glides to where it goes
    used, cached, whole = device.locator(".base").evaluate(widths)
    assert used == pytest.approx(0.25, abs=0.01) and cached / whole == pytest.approx(0.5, abs=0.01)
    take_screenshots(live, "cached")
    chain = state(3.0, is_dropped=True, used=16, idle=48)  # nothing is free: dropped weights' cells hold cached KV, too
    server.show(chain)
    expect(live.locator(".lane")).to_contain_text(["256 of 1,024 tokens of KV, 768 cached"])
    for cell in live.locator(".device").first.locator(".cell.kv").all():
        used, cached, whole = cell.evaluate(widths)
        assert used + cached / whole == pytest.approx(1.0, abs=0.02)
    server.show(state(4.0))
    expect(live.locator(".lane").first).not_to_contain_text("cached")


def test_where_nothing_can_be_dropped_the_page_says_so_and_what_would_change_it(
    live: Page, server: ScriptedServer
) -> None:
    sentence = "One copy of the weights fits: nothing can be dropped."
    server.show(state(2.0, copies={"now": 1, "at_launch": 1, "no_drop": sentence}))
    expect(live.locator("#copies")).to_have_text(sentence)
    expect(live.locator("#no-transitions")).to_have_text("None so far.")
    server.show(state(3.0, is_dropped=True, transitions=[]))  # two copies have become one
    expect(live.locator("#copies")).to_contain_text("1 of 2 copies of the weights is left")
    expect(live.locator("#no-transitions")).to_contain_text("no burst has filled the KV cache")
    server.show(state(4.0))
    expect(live.locator("#copies")).to_be_empty()


def test_words_are_explained(live: Page) -> None:
    for selector in (
        "#policy",
        "#epoch",
        ".figure:has(#figure-preempted)",
        '[data-unit="embed"] >> nth=0',
        ".lane .chip",
    ):
        assert len(live.locator(selector).first.get_attribute("title") or "") > 8, selector
    help_text = live.locator("#help dl")
    expect(help_text).to_be_hidden()
    live.locator("#help summary").focus()
    live.keyboard.press("Enter")
    expect(help_text).to_be_visible()
    for word in ("epoch", "policy", "preempted", "from cache", "step boundary", "embedding, head", "group"):
        expect(help_text.locator("dt", has_text=word).first).to_be_visible()
    take_screenshots(live, "help")
