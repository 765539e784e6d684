"""A stream as its client has it: what passes on of a replica's marked answer, and what another one is to begin with.

See `kunserve/api/say/marks.py`. What no mark follows is held back: if the replica dies before the mark, another one
says it again. The client sees no mark.
"""

from __future__ import annotations

from typing import Any

import orjson

MARK, END = b": kunserve ", b"\n\n"


class Passed:
    """What one client has been told. `take` is given an answer's bytes as they come, cut anywhere."""

    def __init__(self) -> None:
        """Begin: nothing has been told."""
        self.last_words = b""  # events of an error that the replica has ended with: nobody has seen them
        self._held = b""  # without a mark yet
        self._token_ids: dict[int, list[int]] = {}
        self._num_cached: dict[int, int] = {}

    def take(self, data: bytes) -> bytes:
        """Return what may pass on."""
        data, passed, at = self._held + data, list[bytes](), 0
        while True:
            # A mark begins a line. What a model says cannot: in JSON its line breaks are escaped.
            start = at if data.startswith(MARK, at) else data.find(b"\n" + MARK, at) + 1
            if start < at or not data.startswith(MARK, start) or (end := data.find(END, start)) < 0:
                break
            mark = orjson.loads(data[start + len(MARK) : end])
            events, at = data[at:start], end + len(END)
            if "error" in mark:
                self.last_words = events
            else:
                passed.append(events)
                self._token_ids.setdefault(mark["choice"], []).extend(mark["token_ids"])
                self._num_cached[mark["choice"]] = mark["cached"]
        self._held = data[at:]
        return b"".join(passed)

    def end(self) -> bytes:
        """Return what the answer ends with; it has come to its end."""
        held, self._held = self._held, b""
        return held

    def forget(self) -> None:
        """Drop what no mark has followed, and the error: another replica goes on."""
        self._held = self.last_words = b""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the client has been told of."""
        return sum(map(len, self._token_ids.values()))

    def resumption(self, path: str, body: Any, num_choices: int) -> bytes:
        """Return the body of POST /kunserve/resume. `body`: the client's, parsed."""
        choices = range(num_choices)
        asked = {
            "path": path,
            "body": body,
            "token_ids": [self._token_ids.get(i, []) for i in choices],
            "num_cached_tokens": [self._num_cached.get(i, 0) for i in choices],
        }
        return orjson.dumps(asked)


def num_choices_of(body: dict[str, Any]) -> int:
    """Return how many choices the answer to a body has: so many prompts, times `n`."""
    prompt = body.get("prompt")
    is_many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return (len(prompt) if is_many and isinstance(prompt, list) else 1) * (body.get("n") or 1)
