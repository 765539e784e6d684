"""`kunserve doctor`: prints what the checks found; exit status 1 if no server can start on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence

from kunserve.command.command_line import OneLineParser
from kunserve.doctor.probe import Probe
from kunserve.doctor.report import as_json, as_screen, can_start, examine
from kunserve.version import add_version_flag


def make_parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(
        prog="kunserve doctor",
        description="Say what this machine lacks for a server, and what will therefore fail or be slow.",
        epilog="Exit status: 0 if a server can start on devices of some kind, else 1; the last line says which.",
    )
    add_version_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a screen")
    return parser


def main(arguments: Sequence[str], probe: Probe | None = None) -> None:
    """Run `kunserve doctor`: print what the checks find, and exit with 1 if no server can start."""
    args = make_parser().parse_args(arguments)
    probe = probe or Probe()
    if probe.working_folder is None:
        os.chdir("/")  # libraries that torch loads would end the process
    # What packages say while they are imported would be in the JSON; the checks say what matters.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        findings = examine(probe)
    if args.json:
        print(json.dumps(as_json(findings), indent=2))
    else:
        # No rich here: this has to print where packages are broken.
        has_colors = sys.stdout.isatty() and "NO_COLOR" not in probe.environment
        print("\n".join(as_screen(findings, has_colors=has_colors)))
    sys.exit(0 if can_start(findings) else 1)
