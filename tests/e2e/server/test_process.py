"""Starting and stopping: what cannot start says why in one line, what must stop finishes what it has begun."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from tiny_models import make_tiny_model

from e2e.client import Json, events_of, session_of
from e2e.server_process import POLL_S, ServerProcess, run_to_end, running_server
from e2e.tiny import random_prompt


def refused(*flags: str, **settings: object) -> str:
    """The one line that a server ends with that cannot start."""
    code, output = run_to_end(*flags, **settings)
    assert code == 1, output
    [line] = output.splitlines()
    assert line.startswith("kunserve: ")
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nonsense", "no model 'nonsense'; known are: .*smollm2-135m"),
        ("--model llama-70b", "the weights of .* are not on this machine .*hf download .*--load-format dummy"),
        ("--model smollm2-135m --device-memory 300MiB -pp 1", "weights take 530 MiB .* 2 device.s. have 300 MiB each"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(flags: str, message: str) -> None:
    assert re.search(message, refused(*flags.split(), environment={"HF_HUB_OFFLINE": "1"}))


def test_a_port_in_use(tiny_flags: tuple[str, ...]) -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused(*tiny_flags, port=port)


def test_a_start_says_what_bounds_requests_and_what_is_not_obeyed(tmp_path: Path) -> None:
    folder = make_tiny_model("mistral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 7}))
    with running_server("--model", str(folder), "--devices", "cpu:2", "--num-gpu-blocks-override", "64") as server:
        lines = server.log.splitlines()
    assert [line for line in lines if "dynamic scaling" in line and "max_model_len=512" in line]
    assert [line for line in lines if "not obeyed" in line and "max_length=7" in line]


def test_closed_standard_files_are_nobodys_fault(tiny_flags: tuple[str, ...]) -> None:
    """Supervisors close them; a connection that got the number of one would end the process with an abort."""
    closing = ("sh", "-c", 'exec "$0" "$@" <&- >&-', sys.executable, "-m", "kunserve.server")
    with running_server(*tiny_flags, command=closing) as server:
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0, server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_that_still_loads(number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a Hub that takes connections and never answers
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        server = ServerProcess("--model", "somebody/tiny", environment=environment)
        try:
            connection, _ = silent.accept()  # the model is being loaded
            server.send_signal(number)
            assert server.wait() == 0
            assert "Traceback" not in server.log and "stopped" in server.log.splitlines()[-1]
            connection.close()
        finally:
            server.close()


# --- stopping ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["0", "2"], ids=["alone", "workers"])
def server(tiny_flags: tuple[str, ...], request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    flags = ("--shutdown-timeout", "600", "--api-workers", request.param)
    with running_server(*tiny_flags, *flags) as server, server.log_shown():
        yield server


def long_answer(n: int, max_tokens: int) -> Json:
    return {"prompt": random_prompt(5), "n": n, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


async def until_refused(session: aiohttp.ClientSession) -> None:
    """Return when the server says that it takes no more requests."""
    while True:
        async with session.get("/ready") as response:
            if response.status == 503:
                return
        await asyncio.sleep(POLL_S)


async def test_sigterm_lets_streams_finish_and_refuses_what_is_new(server: ServerProcess) -> None:
    async with session_of(server) as session, session.post("/v1/completions", json=long_answer(32, 300)) as response:
        events = events_of(response)
        await anext(events)
        server.send_signal(signal.SIGTERM)
        await until_refused(session)
        async with session.post("/v1/completions", json={"prompt": "late"}) as late:
            assert late.status == 503 and int(late.headers["Retry-After"]) > 0
            assert (await late.json())["error"]["type"] == "ServiceUnavailableError"
        reasons = [choice["finish_reason"] async for event in events for choice in event["choices"]]
        assert [reason for reason in reasons if reason is not None] == ["length"] * 32
    assert server.wait() == 0


async def test_a_second_signal_ends_at_once(server: ServerProcess) -> None:
    async with session_of(server) as session, session.post("/v1/completions", json=long_answer(100, 2000)) as response:
        events = events_of(response)
        await anext(events)
        server.send_signal(signal.SIGINT)
        await until_refused(session)
        server.send_signal(signal.SIGINT)
        rest = [event async for event in events]
        assert rest[-1]["error"]["code"] == 503
    assert server.wait() == 0


def test_an_idle_server_stops(server: ServerProcess) -> None:
    children = psutil.Process(server.pid).children()
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "Traceback" not in server.log
    assert not any(child.is_running() for child in children)
