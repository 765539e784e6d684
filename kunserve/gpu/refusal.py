"""Refusal: tells what a device or the system refuses, for which there is a plan, from a bug of ours."""

from __future__ import annotations

from typing import Any

import structlog

from kunserve.errors import DeviceError

log = structlog.get_logger()


def is_refusal(error: BaseException) -> bool:
    """Return whether a device or the operating system refused; a group of errors is a refusal if each one is."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_refusal(part) for part in error.exceptions)
    return isinstance(error, (DeviceError, OSError))


def log_failure(event: str, error: Exception, **details: Any) -> None:
    """Log a failure that was made good: a refusal as a warning in one line, a bug of ours with its traceback."""
    if is_refusal(error):
        log.warning(event, error=repr(error), **details)
    else:
        log.error(event, error=repr(error), exc_info=error, **details)
