"""`kunserve serve MODEL`: the console script; all it knows is its subcommands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from kunserve.version import installed_version

COMMANDS = ("serve", "top", "replay", "loadgen", "plan", "simulate", "doctor")
USAGE = """usage: kunserve serve MODEL [flags]    serve a model (kunserve serve --help lists the flags)
       kunserve top [URL]              watch a server in the terminal
       kunserve replay FILE            make a page of a recorded run
       kunserve loadgen [URL] [flags]  put load on a server and measure its answers
       kunserve plan --gpus 4xH100 --model MODEL --rate R   say what GPUs carry, and what a drop gains
       kunserve simulate [flags]       run a load on simulated GPUs, of one server or of several
       kunserve doctor [--json]        say what this machine lacks
       kunserve --version
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name (default: those of the process)."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    try:
        _run(command, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # `kunserve doctor | head`: nobody reads on, and Python would fail again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(command: str, rest: list[str]) -> None:
    """Import the command that is named, and no other: they need different packages."""
    if command == "serve":
        from kunserve import server

        server.run(rest, prog="kunserve serve")
    elif command == "top":
        from kunserve.command import top

        top.main(rest)
    elif command == "replay":
        from kunserve.command import replay

        replay.main(rest)
    elif command == "loadgen":
        from kunserve.loadgen import command as loadgen

        sys.exit(loadgen.main(rest))
    elif command == "plan":
        from kunserve.sim.plan import command as plan

        plan.main(rest)
    elif command == "simulate":
        from kunserve.sim import __main__ as simulate

        simulate.main(rest)
    elif command == "doctor":
        from kunserve.doctor import command as doctor

        doctor.main(rest)
    elif command in ("--version", "-v", "-V", "version"):
        print(installed_version())
    elif command in ("--help", "-h", "help"):
        print(USAGE, end="")
    elif not command:
        sys.exit(USAGE.rstrip())
    else:
        close = get_close_matches(command, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        sys.exit(f"kunserve: no such command: {command!r}{meant} (see kunserve --help)")
