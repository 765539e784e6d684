from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from kunserve.log import set_up_logging


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def say(level: str, as_json: bool) -> None:
    set_up_logging(level, as_json)
    log = structlog.get_logger()
    log.debug("too fine")
    log.warning("the queue is full", num=3, who='a "b"')


def test_lines_of_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    say("info", as_json=False)
    shown = capfd.readouterr()
    [line] = shown.err.splitlines()
    assert "warning" in line and "the queue is full" in line and "num=3" in line
    assert shown.out == ""


def test_json_lines(capfd: pytest.CaptureFixture[str]) -> None:
    say("debug", as_json=True)
    fine, full = map(json.loads, capfd.readouterr().err.splitlines())
    assert (fine["level"], fine["event"]) == ("debug", "too fine")
    assert full.pop("timestamp").endswith("Z")
    assert full == {"level": "warning", "event": "the queue is full", "num": 3, "who": 'a "b"'}


def test_errors_keep_prompts_to_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    prompt = "my secret"
    set_up_logging("info", as_json=True)
    try:
        len(prompt) // 0
    except ZeroDivisionError:
        structlog.get_logger().exception("request failed")
    [line] = capfd.readouterr().err.splitlines()
    assert "ZeroDivisionError" in line and "my secret" not in line
