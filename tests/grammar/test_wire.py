from __future__ import annotations

import pytest

from kunserve.grammar.wire import POSITION, Frames, Kind, frame


@pytest.mark.parametrize("num_bytes", [1, 2, 5, 7, 1000])
def test_frames_come_whole_however_the_stream_is_cut(num_bytes: int) -> None:
    sent = [(Kind.MORE, POSITION.pack(1, 2)), (Kind.MASK, b"x" * 300), (Kind.COMPILE, b"")]
    data = b"".join(frame(kind, payload[:4], payload[4:]) for kind, payload in sent)
    frames = Frames()
    received = [each for i in range(0, len(data), num_bytes) for each in frames.receive(data[i : i + num_bytes])]
    assert received == sent
