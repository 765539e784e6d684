"""`python -m kunserve.server`: judge the command line and the model's name, then serve.

What the process does then is in `serving.py`. It is imported only when nothing is wrong so far: torch takes seconds,
and a wrong flag or name is told at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

import structlog

from kunserve.command.arguments import parse_args
from kunserve.errors import ConfigError
from kunserve.host.torch_ahead import hasten_torch
from kunserve.log import set_up_logging
from kunserve.model.card import check_model

log = structlog.get_logger()


def run(arguments: Sequence[str], prog: str = "python -m kunserve.server") -> None:
    """Serve until a signal; errors that a user can mend end the process with one line."""
    _open_standard_files()
    gc.disable()  # nearly all that is made until the server is ready stays: collections cost a tenth of the start
    try:
        config = parse_args(arguments, prog)
        check_model(config.engine.model, config.engine.load_format, quantization=config.engine.quantization)
        set_up_logging(config.log_level, config.log_json)
        for flag, why in config.http.ignored.items():
            log.warning("flag without effect", flag=flag, because=why)

        if config.engine.devices.kind == "cpu":
            hasten_torch()
        import uvloop

        from kunserve.command.serving import serve

        uvloop.run(serve(config))
    except ConfigError as error:
        sys.exit(f"kunserve: {error.message}")
    except KeyboardInterrupt:  # before there is a loop that listens to signals
        sys.exit(130)
    finally:
        gc.enable()


def _open_standard_files() -> None:
    """Give a process whose stdin, stdout or stderr was closed empty ones: libuv ends one that gets their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def main() -> None:
    """Run as `python -m kunserve.server`."""
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
