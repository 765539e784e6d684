import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from kunserve.model.file_lock import file_lock

HOLD = """
import sys
from pathlib import Path
from kunserve.model.file_lock import file_lock
with file_lock(Path(sys.argv[1]), lambda: print("waits", flush=True)):
    print("holds", flush=True)
    sys.stdin.read()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_process_waits_and_gets_the_lock_when_the_first_is_killed(tmp_path: Path) -> None:
    with _holder(tmp_path / "lock") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        with _holder(tmp_path / "lock") as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "waits\n"
            first.kill()
            assert second.stdout.readline() == "holds\n"


def test_a_file_system_without_locks_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, "no locks")

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with file_lock(tmp_path / "lock", lambda: None):
        pass
    refuse(errno.EIO)
    with pytest.raises(OSError, match="no locks"), file_lock(tmp_path / "lock", lambda: None):
        pass
