"""The version of what is installed, and the flag that shows it."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Return KunServe's version; "unknown" in a checkout that nobody has installed."""
    try:
        return version("kunserve")
    except PackageNotFoundError:
        return "unknown"


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--version`, which prints the version and ends the process."""
    parser.add_argument("--version", action="version", version=installed_version(), help="show the version")
