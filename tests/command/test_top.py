from __future__ import annotations

from io import StringIO

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console
from states import drop_transition, gone, state

from kunserve.command import top
from kunserve.command.top import Screen, UnreachableError, events, watch
from kunserve.observe.frame import delta_of, frame_of

RATES = {
    "tok_s": 1234.4,
    "gap_s": 0.25,
    "ttft_p50_s": 0.0421,
    "ttft_p99_s": 2.5,
    "hit_share": 0.841,
    "hit_share_ever": 0.5,
}


def shown(screen: Screen, width: int = 80) -> list[str]:
    """The lines of a terminal without colours."""
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(screen.render())
    file = console.file
    assert isinstance(file, StringIO)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def after_a_drop(**more: object) -> Screen:
    screen = Screen()
    before = frame_of(state(1.0, used=30, waiting=4), model="m", rates={"tok_s": 0.0})
    after = frame_of(state(3.5, is_dropped=True, used=32, idle=8), model="m", rates=RATES)
    screen.take("snapshot", before)
    screen.take("delta", delta_of(before, {**after, **more}))
    return screen


def test_eighty_columns_hold_everything() -> None:
    lines = shown(after_a_drop())
    assert max(map(len, lines)) <= 80 and len(lines) <= 24
    text = "\n".join(lines)
    assert "m  policy drop  epoch 1" in text
    assert "1,234 tok/s  1 running  0 waiting  TTFT p50 42 ms p99 2.5 s  preempted 0" in text
    assert "group 2  [cpu:0 0–1 → cpu:1 2–3]  1 running  1/2 in flight  512/1,024 tokens" in text
    assert "▼ drop    done  0+1→2  28 MiB  boundary 12 ms, remap 2 ms, exchange 100 ms" in text
    marks = next(line for line in lines if line.strip() == "▼")
    speeds = next(line for line in lines if line.startswith("tok/s"))
    assert marks.index("▼") == speeds.index("█") - 1  # in the second before


def test_a_transition_that_lost_kv_says_of_how_many() -> None:
    lost = after_a_drop(transitions={"1": {**drop_transition(1.0), "num_lost": 3}})
    assert any("28 MiB, 3 lost  boundary" in line for line in shown(lost))
    assert not any("lost" in line for line in shown(after_a_drop()))


def test_a_bar_is_the_devices_memory_in_five_signs() -> None:
    bar = next(line for line in shown(after_a_drop()) if line.startswith("cpu:0"))
    signs = "".join(c for c in bar if c in "█▓▒░·")
    assert (len(signs), signs) == (48, "█" * 11 + "▓" * 17 + "▒" * 4 + "░" * 13 + "·" * 3)
    assert bar.endswith("KV 21/42 MiB")


def test_the_prefix_cache_says_what_it_keeps_and_what_it_is_good_for() -> None:
    line = "prefix cache: keeps 128 tokens, had 84% of recent prompts, 50% since the start"
    assert line in shown(after_a_drop())
    assert "prefix cache: keeps 128 tokens, no prompt so far" in shown(after_a_drop(rates={"tok_s": 0.0}))


def test_many_devices_and_long_names_do_not_break_the_lines() -> None:
    transitions = {str(i): {**drop_transition(float(i)), "outcome": "failed after its commit"} for i in range(9)}
    stages = [[f"cuda:{i}", i, i + 1] for i in range(64)]
    groups = {"2": {"stages": stages, "blocks": 10**6, "used": 10**6, "idle": 0, "running": 999, "in_flight": 64}}
    screen = after_a_drop(model="\x1b[31mred\x07" + "x" * 300, transitions=transitions, groups=groups)
    lines = shown(screen)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines) and "\x07" not in "".join(lines)


def test_a_microbatch_that_is_planned_ahead_is_not_in_flight() -> None:
    group = {"stages": [["cpu:0", 0, 4]], "blocks": 32, "used": 4, "idle": 0, "running": 1, "in_flight": 2}
    text = "\n".join(shown(after_a_drop(groups={"2": group})))
    assert "1 running  1/1 +1 in flight" in text


def test_devices_that_do_not_do_their_work_are_named() -> None:
    assert not any("suspect" in line or "lost" in line for line in shown(after_a_drop()))
    scene = gone(state(2.0, used=4), 1)
    scene["devices"][0] |= {"state": "suspect"}
    screen = Screen()
    screen.take("snapshot", frame_of(scene, model="m", rates=RATES))
    lines = shown(screen)
    assert max(map(len, lines)) <= 80 and len(lines) <= 24
    assert "suspect (no new requests while others can take them): cpu:0" in lines
    assert "lost (declared dead): cpu:1" in lines
    [bar] = [line for line in lines if line.startswith("cpu:1")]
    assert "× lost ×" in bar and not set("█▓▒░·") & set(bar)
    assert [line.split("  ")[0] for line in lines if line.startswith("group")] == ["group 0"]


def test_a_server_whose_devices_are_all_gone_is_shown() -> None:
    screen = Screen()
    screen.take("snapshot", frame_of(gone(gone(state(2.0), 0), 1, "removed"), model="m", rates=RATES))
    lines = shown(screen)
    assert "removed (taken out by an operator): cpu:1" in lines
    assert not any(line.startswith("group") for line in lines)


def test_frames_of_before_devices_had_a_state() -> None:
    screen = after_a_drop()
    for device in screen.frame["devices"].values():
        del device["state"]
    assert shown(screen) == shown(after_a_drop())


@pytest.mark.parametrize(
    ("kind", "old", "new", "says"),
    [
        ("lose", (1,), (), "† device loss done  1→none"),
        ("remove", (1, 2), (3,), "− device removal done  1+2→3"),
        ("add", (), (4,), "+ device addition done  none→4"),
    ],
)
def test_transitions_of_devices_are_said_in_words(
    kind: str, old: tuple[int, ...], new: tuple[int, ...], says: str
) -> None:
    change = {**drop_transition(1.0), "kind": kind, "old_groups": old, "new_groups": new}
    lines = shown(after_a_drop(transitions={"1": change}))
    assert any(line.startswith(says) for line in lines)
    assert max(map(len, lines)) <= 80
    change |= {"outcome": "rolled back", "new_groups": (), "seconds": {}}
    del change["epoch"]
    assert not any("none" in line and old for line in shown(after_a_drop(transitions={"1": change})))


def test_old_times_to_first_token_say_how_old_they_are() -> None:
    lines = shown(after_a_drop(at_s=57.5, rates={**RATES, "ttft_at_s": 15.0}))
    assert "TTFT p50 42 ms p99 2.5 s 42 s ago preempted 0" in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80 and len(lines) <= 24


def test_a_drop_in_progress_says_what_it_is_at() -> None:
    drop = {**drop_transition(3.0), "outcome": "running", "weight_bytes": 0, "planned_bytes": 28 << 20}
    text = "\n".join(shown(after_a_drop(transitions={"3.000": {**drop, "seconds": {}, "step": "boundary"}})))
    assert "▼ drop    running  0+1→2  28 MiB  boundary …" in text


def test_where_nothing_can_be_dropped_that_is_said() -> None:
    why = "One copy of the weights (131.5 GiB) fits: nothing can be dropped. Two would fit on 4 devices like these."
    screen = after_a_drop(copies={"now": 1, "at_launch": 1, "no_drop": why}, transitions={})
    lines = shown(screen)
    assert max(map(len, lines)) <= 80 and why in " ".join(" ".join(lines).split())
    assert why not in " ".join(" ".join(shown(after_a_drop(transitions={}))).split())


def test_before_the_first_frame() -> None:
    assert shown(Screen()) == ["waiting for the server"]


async def serve_feed(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") != "Bearer k":
        raise web.HTTPUnauthorized
    data = orjson.dumps(frame_of(state(used=3), model="m", rates=RATES))
    return web.Response(body=b"event: snapshot\ndata: %s\n\n" % data, content_type="text/event-stream")


async def test_a_server_that_loads_is_waited_for() -> None:
    async def loading(_: web.Request) -> web.Response:
        raise web.HTTPServiceUnavailable

    app = web.Application()
    app.router.add_get("/kunserve/events", loading)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        with pytest.raises(aiohttp.ClientError, match="is not ready"):  # which `watch` tries again after
            await anext(events(url, None))


async def test_it_follows_a_server_and_says_why_it_cannot() -> None:
    app = web.Application()
    app.router.add_get("/kunserve/events", serve_feed)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        seen = [(name, frame["model"]) async for name, frame in events(url, "k")]
        assert seen == [("snapshot", "m")]
        out = StringIO()
        await watch(url, "k", Console(file=out, width=80), is_once=True)
        assert "group 0" in out.getvalue()
        for key, path, reason in ((None, "", "asks for its API key"), ("k", "/other", "HTTP 404")):
            with pytest.raises(UnreachableError, match=reason):
                await watch(url + path, key, Console(file=out), is_once=True)


async def test_another_server_is_called_so() -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="hello", content_type="text/html")

    app = web.Application()
    app.router.add_get("/page/kunserve/events", page)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        for base, answer in ((url, "HTTP 404"), (f"{url}/page", "text/html")):
            with pytest.raises(UnreachableError, match=f"^{base} is no KunServe server: .*/events answers {answer}$"):
                await anext(events(base, None))


@pytest.mark.parametrize("url", ["localhost:18101", "", "http://[::1", "http://"])
def test_what_is_no_url_is_said_in_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        top.main([url, "--once"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kunserve top: ") and f"'{url}'" in line


def test_a_url_may_be_that_of_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def watch(url: str, *_: object, is_once: bool) -> None:
        asked.append(url)

    monkeypatch.setattr(top, "watch", watch)
    top.main(["http://127.0.0.1:1/v1/"])
    assert asked == ["http://127.0.0.1:1"]


def test_the_command_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^kunserve top: Cannot connect to host 127\.0\.0\.1:1 \["):
        top.main(["http://127.0.0.1:1", "--once"])
    with pytest.raises(SystemExit):
        top.main(["--help"])
    assert "kunserve top" in capsys.readouterr().out
