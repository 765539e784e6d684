"""What the server and a structure's process say to each other: frames of a length, a kind and a few bytes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct

_HEADER = Struct("<IB")  # bytes that follow the header, kind
COST = Struct("<dQ")  # seconds of CPU, bytes of memory
POSITION = Struct("<II")  # a matcher's number, and how many tokens it has then taken

FORK, KILL, READY, FAILED, EXIT = b"F", b"K", b"R", b"E", b"X"  # to and from the fork server, one packet each
ORDER = Struct("<cI")  # one of them, and the serial number of a process
EXITED = Struct("<cIIi")  # EXIT, serial number, process id, what `os.waitpid` says


class Kind(IntEnum):
    """What a frame says. To the process: COMPILE, ADVANCE, CLOSE; the others are its answers."""

    COMPILE = 0  # kind of structure, zero byte, text
    ADVANCE = 1  # POSITION after them, tokens (uint32): answered by a verdict, and a mask unless that ends it
    CLOSE = 2  # POSITION: forget the matcher
    COMPILED = 3  # COST, mask of the first token
    REFUSED = 4  # COST, why
    MORE = 5  # POSITION: the last token may follow, and something may follow it
    FINISHED = 6  # POSITION: nothing may
    WRONG = 7  # POSITION, why: it may not follow
    UNUSABLE = 8  # POSITION, what the structure is: too complex, or a dead end
    MASK = 9  # POSITION, bits


def frame(kind: Kind, *parts: bytes) -> bytes:
    """Return the bytes of one frame."""
    return b"".join((_HEADER.pack(sum(map(len, parts)), kind), *parts))


class Frames:
    """Makes frames of what a stream brings."""

    def __init__(self) -> None:
        self._data = bytearray()

    def receive(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Yield the frames that `data` completes. The iterator is read to its end."""
        self._data += data
        start = 0
        while len(self._data) - start >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._data, start)
            end = start + _HEADER.size + length
            if len(self._data) < end:
                break
            yield Kind(kind), bytes(self._data[start + _HEADER.size : end])
            start = end
        del self._data[:start]
