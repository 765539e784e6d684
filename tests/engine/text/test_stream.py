"""The way out of the engine: merged for a slow reader, ended exactly once."""

from __future__ import annotations

import pytest
from engine_fakes import read

from kunserve.engine.request import Output
from kunserve.engine.text.stream import OutputStream
from kunserve.errors import EngineError
from kunserve.sampling import FinishReason, TokenLogprobs

LOGPROBS = TokenLogprobs(2, -0.5, ())


async def test_what_a_slow_reader_has_not_taken_is_merged() -> None:
    stream = OutputStream()
    stream.put(Output("a", (1,)))
    stream.put(Output("b", (2,), (LOGPROBS,)))
    assert await anext(stream) == Output("ab", (1, 2), (LOGPROBS,))
    stream.put(Output("c", (3,)))
    stream.put(Output("", (4,), (), FinishReason.STOP, "x"))
    assert await read(stream) == [Output("c", (3, 4), (), FinishReason.STOP, "x")]
    assert await read(stream) == []  # ended is ended


async def test_an_error_comes_after_what_is_there_and_once() -> None:
    stream = OutputStream()
    stream.put(Output("a", (1,)))
    stream.fail(EngineError("broken"))
    assert await anext(stream) == Output("a", (1,))
    with pytest.raises(EngineError, match="broken"):
        await anext(stream)
    assert await read(stream) == []
