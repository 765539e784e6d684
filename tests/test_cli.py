from __future__ import annotations

import subprocess
import sys

import pytest

from kunserve.cli import main
from kunserve.version import installed_version


def test_serve_takes_the_flags_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    assert "usage: kunserve serve" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--port 0: must be between 1 and 65535"):
        main(["serve", "m", "--port", "0"])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    main(["--help"])
    shown = capsys.readouterr().out
    assert shown[0].isdigit() and "kunserve serve MODEL" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage: kunserve serve"), (["bench"], "no such command: 'bench' \\("), (["serv"], "did you mean serve")],
)
def test_other_commands(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_each_command_shows_its_flags_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "top", "replay", "loadgen", "simulate", "doctor"):
        for flag, shown in (("--help", f"usage: kunserve {command}"), ("--version", installed_version())):
            with pytest.raises(SystemExit) as caught:
                main([command, flag])
            assert caught.value.code == 0
            assert shown in capsys.readouterr().out


def test_a_reader_who_leaves_early_sees_no_traceback() -> None:
    shown = subprocess.run(
        f"{sys.executable} -m kunserve doctor --json | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.stdout, shown.stderr) == ("{\n", "")
