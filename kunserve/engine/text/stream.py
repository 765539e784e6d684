"""The way out of the engine: one request's outputs, read by one consumer at its own pace."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Protocol

from kunserve.engine.request import Output
from kunserve.errors import KunServeError


class Sink(Protocol):
    """The receiver of one request's outputs."""

    wants_text: ClassVar[bool] = True  # False: makes text of the tokens itself, and follows the stop strings

    def put(self, output: Output) -> None:
        """Take a delta; the one with a finish reason is the last."""

    def put_token(self, text: str, token_id: int) -> None:
        """Take a delta of one token, of which nobody asked more."""
        self.put(Output(text, (token_id,)))

    def fail(self, error: KunServeError) -> None:
        """End with an error."""


class OutputStream(Sink):
    """Async iterator of `Output`. What a slow consumer has not taken yet is merged, so it never grows by items."""

    def __init__(self) -> None:
        self._pending: Output | None = None
        self._error: KunServeError | None = None
        self._ready = asyncio.Event()
        self._is_finished = False

    def put(self, output: Output) -> None:
        """Add a delta; the one with a finish reason is the last."""
        last = self._pending
        self._pending = output if last is None else merged(last, output)
        self._ready.set()

    def fail(self, error: KunServeError) -> None:
        """End with an error, after what is already there."""
        self._error = error
        self._ready.set()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> Output:
        if self._is_finished:
            raise StopAsyncIteration
        await self._ready.wait()
        if (output := self._pending) is not None:
            self._pending = None
            if self._error is None:
                self._ready.clear()
            self._is_finished = output.finish_reason is not None
            return output
        assert self._error is not None
        self._is_finished = True
        raise self._error


def merged(a: Output, b: Output) -> Output:
    """Return two outputs of a request, one after the other, as one."""
    return Output(
        a.text + b.text,
        a.token_ids + b.token_ids,
        a.logprobs + b.logprobs,
        b.finish_reason,
        b.stop_reason,
        a.prompt_logprobs + b.prompt_logprobs,
    )
