from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from own_server import running_server
from tiny_models import make_tiny_model


async def test_a_server_is_there_until_the_block_is_left(tmp_path: Path) -> None:
    folder, log = make_tiny_model("llama", tmp_path / "model"), tmp_path / "server.log"
    memory = ("--num-gpu-blocks-override", "64")
    async with running_server("--model", str(folder), "--devices", "cpu:1", *memory, log=log) as server:
        assert len((await server.state())["groups"]) == 1
        assert psutil.pid_exists(server.pid)
    assert not psutil.pid_exists(server.pid)
    assert log.stat().st_size > 0


async def test_a_server_that_does_not_start_ends_the_script_with_what_it_said() -> None:
    with pytest.raises(SystemExit, match="the server ended with 1:\nkunserve: no model 'no-such-model'"):
        async with running_server("no-such-model"):
            pass
