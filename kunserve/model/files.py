"""Model files: reading what others have put on the disk. Whatever the system refuses becomes one line with the path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kunserve.errors import ConfigError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every OSError of the block into "cannot read PATH: reason"."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {_reason(error, path)}") from None


def expand_home(text: str, source: str) -> Path:
    """Return the path that a flag or a variable (`source`) names, its `~` or `~user` replaced.

    Raises ConfigError, which names the source, if nobody knows that user's home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition(os.sep)[0]
        raise ConfigError(f"{source} {text}: no home folder of {user} is known; give the whole path") from None


def _reason(error: OSError, path: Path) -> str:
    """Return what the system says, without its number and the path once more."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"it is a link to a file that is gone ({os.readlink(path)}); fetch the model again"
    return error.strerror or str(error)
