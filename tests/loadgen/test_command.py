"""`kunserve loadgen` as users call it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import pytest
from scripted_server import ScriptedServer, hang, scripted_server

from kunserve.loadgen import command as loadgen

COMMAND = (sys.executable, "-c", "from kunserve.cli import main; main()", "loadgen")
SCRIPT = (sys.executable, str(Path(__file__).parents[2] / "scripts" / "loadgen.py"))
NO_MATPLOTLIB = "import sys; sys.modules['matplotlib'] = None; from kunserve.cli import main; main()"

# Every module of the package is imported: one that is only imported later would not hide what it brings along.
IMPORTS = """
import importlib, pkgutil, sys, kunserve.loadgen
for module in pkgutil.iter_modules(kunserve.loadgen.__path__, "kunserve.loadgen."):
    importlib.import_module(module.name)
assert "kunserve.loadgen.command" in sys.modules
print(*sorted({"torch", "matplotlib"} & sys.modules.keys()))
"""


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as server:
        yield server


def test_the_load_generator_starts_without_torch_and_matplotlib() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def shown(*command: str) -> str:
    """What a command that ends at once writes to stdout."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def start(command: tuple[str, ...], server: ScriptedServer, *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(*command, "--url", server.url, *arguments, stdout=PIPE, stderr=PIPE)


def test_usage_and_examples_name_the_command_that_was_called() -> None:
    by_command, by_script = shown(*COMMAND, "--help"), shown(*SCRIPT, "--help")
    assert by_command.startswith("usage: kunserve loadgen [") and "    kunserve loadgen --num-requests 20" in by_command
    assert by_script.startswith("usage: loadgen.py [") and "    loadgen.py --num-requests 20" in by_script
    assert "kunserve loadgen" not in by_script and "loadgen.py" not in by_command


def test_its_version_is_that_of_the_package() -> None:
    assert shown(*COMMAND, "--version") == shown(*SCRIPT, "--version") == f"{version('kunserve')}\n"


async def test_command_and_script_send_the_same_load(server: ScriptedServer) -> None:
    load = ("--num-requests", "3", "--input-len", "4:9", "--output-len", "2:5", "--seed", "7")
    for command in (COMMAND, SCRIPT):
        process = await start(command, server, *load)
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, stderr
        assert json.loads(stdout)["completed"] == 3
    first, second = (sorted(bodies, key=json.dumps) for bodies in (server.bodies[:3], server.bodies[3:]))
    assert first == second and len(first) == 3


async def test_the_url_may_stand_by_itself(server: ScriptedServer, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    process = await asyncio.create_subprocess_exec(*COMMAND, server.url, "--num-requests", "2", "--json", str(path))
    assert await process.wait() == 0
    assert len(server.bodies) == 2
    settings = json.loads(path.read_text())["args"]
    assert settings["url"] == [server.url] and "server" not in settings


async def test_a_missing_matplotlib_is_said_before_the_run(server: ScriptedServer, tmp_path: Path) -> None:
    process = await start(
        (sys.executable, "-c", NO_MATPLOTLIB, "loadgen"),
        server,
        "--num-requests",
        "1",
        "--plot",
        str(tmp_path / "run.png"),
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 2 and stdout == b""
    assert stderr == b"kunserve loadgen: --plot needs matplotlib: pip install 'kunserve[plot]'\n"
    assert server.bodies == []


async def test_the_last_line_of_stdout_is_one_json_object(server: ScriptedServer, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    process = await start(
        COMMAND, server, "--num-requests", "6", "--output-len", "3:5", "--json", str(path), "--api-key", "secret"
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr
    summary = json.loads(stdout.decode().strip().splitlines()[-1])
    assert summary["completed"] == 6 and summary["output_tokens"] == sum(b["max_tokens"] for b in server.bodies)
    assert {body["model"] for body in server.bodies} == {"tiny"}
    assert b"6 completed" in stderr
    document = json.loads(path.read_text())
    assert document["summary"] == summary and len(document["requests"]) == 6
    assert "secret" not in path.read_text()


async def test_an_interrupt_prints_the_report_of_what_finished(server: ScriptedServer, tmp_path: Path) -> None:
    server.scripts[9] = hang
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,3\n0,5,9\n1000000,5,3\n")
    process = await start(COMMAND, server, "--trace", str(trace), "--concurrency", "1")
    await server.wait_for(lambda: len(server.bodies) == 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = await process.communicate()
    assert process.returncode == 130, stderr
    summary = json.loads(stdout.decode().strip().splitlines()[-1])
    assert (summary["completed"], summary["unfinished"], summary["failed"]) == (1, 2, 0)


async def test_a_run_in_which_nothing_completes_ends_with_status_1(server: ScriptedServer) -> None:
    process = await start(COMMAND, server, "--num-requests", "2", "--output-len", "503", "--model", "m")
    stdout, _ = await process.communicate()
    assert process.returncode == 1
    assert json.loads(stdout)["failures"] == {"HTTP 503: the queue is full": 2}


@pytest.mark.parametrize(
    "argv",
    [
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--num-requests", "0"],
        ["--cancel-fraction", "1.1"],
        ["--input-len", "9:3"],
        ["--burst", "nonsense"],
        ["--url", "localhost:8000"],
        ["localhost:8000"],
        ["http://localhost:8001", "--url", "http://localhost:8000"],
        ["--extra-body", "[1]"],
        ["--extra-body", "{"],
        ["--trace-window", "9:3"],
        ["--plot", "/no/such/folder/x.png"],
        ["--trace", "/no/such/file.csv"],
        ["--burst", "0.000001:0.000001"],
        ["http://"],
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        loadgen.main(argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kunserve loadgen: ")
