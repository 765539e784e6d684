from __future__ import annotations

import pytest

from kunserve.cli import main


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


@pytest.mark.parametrize(("arguments", "message"), [([], "no command"), (["bench"], "no such command: bench")])
def test_other_commands(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_watching_replaying_and_the_doctor_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("top", "replay", "doctor"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"usage: kunserve {command}" in capsys.readouterr().out
