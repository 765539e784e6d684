"""Structured logging: one event per line, readable on a terminal, JSON elsewhere if asked for."""

from __future__ import annotations

import logging
import sys

import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer


def set_up_logging(level: str, as_json: bool) -> None:
    """Send all events of `level` and above to stderr, from now on. To be called once, at start-up.

    Tracebacks are without local variables: those hold prompts, and may be as long.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S.%f", utc=as_json),
    ]
    if as_json:
        structlog.configure(
            processors=[
                *shared,
                structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
                structlog.processors.JSONRenderer(serializer=lambda value, **_: orjson.dumps(value, default=str)),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
            logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        )
    else:
        structlog.configure(
            processors=[
                *shared,
                structlog.dev.ConsoleRenderer(
                    colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
