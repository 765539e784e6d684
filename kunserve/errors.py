"""Every error a user can meet: the closed list, each with its HTTP status and whether to retry."""

from __future__ import annotations


class KunServeError(Exception):
    """Base of all errors that are answered to a user; `message` is complete and readable on its own."""

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ConfigError(KunServeError):
    """The server cannot start like this (flags, model card, checkpoint, memory); shown on the terminal."""


class InvalidRequestError(KunServeError):
    """The request can never succeed as it is: malformed JSON, a wrong type or value, a prompt too long."""

    status = 400
    type = "BadRequestError"


class UnsupportedThreadError(InvalidRequestError):
    """The server is to keep the messages of a thread, and keeps none; clients that read this send them all instead."""


class UnauthorizedError(KunServeError):
    """The key is missing or wrong."""

    status = 401
    type = "AuthenticationError"


class ForbiddenError(KunServeError):
    """Nobody may do this on this server."""

    status = 403
    type = "PermissionDeniedError"


class NotFoundError(KunServeError):
    """No such model, route or request."""

    status = 404
    type = "NotFoundError"


class ConflictError(KunServeError):
    """The request is right but not now: for instance a drop while another transition runs."""

    status = 409
    type = "ConflictError"


class PayloadTooLargeError(KunServeError):
    """The body is larger than the server reads."""

    status = 413
    type = "PayloadTooLargeError"


class OverloadedError(KunServeError):
    """The queue is full or the server is stopping; try again after `retry_after_s`."""

    status = 503
    type = "ServiceUnavailableError"


class EngineError(KunServeError):
    """A step failed on a device; the requests it carried end with this."""


class DeviceError(EngineError):
    """A memory or copy operation failed on a device; names the device and the driver's error."""


class DeviceLostError(DeviceError):
    """A kernel has faulted: its GPU does nothing more for this process, which ends."""
