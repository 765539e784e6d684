"""GET /kunserve/events: the server as its viewers see it. A snapshot, then what changed, at most ten times a second.

Each frame is made once for all viewers, and one a second while nobody watches: who comes after a burst can still see
it. Nobody waits for a viewer: one that does not read is cut off when `BEHIND_BYTES` of its updates are waiting in the
process.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from aiohttp import web

from kunserve.api.wire.sse import EventStream
from kunserve.errors import OverloadedError
from kunserve.observe.frame import NUM_TRANSITIONS, Frame, delta_of, frame_of
from kunserve.observe.metrics import Metrics
from kunserve.percentiles import quantile

log = structlog.get_logger()

TICK_S = 0.1
QUIET_S = 1.0  # between updates that say nothing but the time
RATE_S = 2.0  # window of tokens per second and of the longest gap
TTFT_S = 10.0  # window of the times to first token
PAST_TICK_S = 1.0  # between frames that are remembered
NUM_PAST = 120
CHARTED = ("at_s", "block_size", "groups", "requests", "rates")  # what is remembered of a frame
BEHIND_BYTES = 32 << 10
MAX_VIEWERS = 200


class RecentRates:
    """Speeds over the last moments, from counters that only grow."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ticks: deque[tuple[float, int, float]] = deque()  # when, tokens since start, longest gap since the last
        metrics.recent.take_gap()  # of the time before

    def at(self, now_s: float) -> Frame:
        """Return the rates at `now_s` on the engine's clock; times that do not exist are left out."""
        recent, ticks = self._metrics.recent, self._ticks
        ticks.append((now_s, self._metrics.num_generation_tokens, recent.take_gap()))
        while len(ticks) > 2 and ticks[1][0] <= now_s - RATE_S:
            ticks.popleft()
        (first_s, first_tokens, _), (_, tokens, _) = ticks[0], ticks[-1]
        rates = {"tok_s": round((tokens - first_tokens) / (now_s - first_s), 1) if now_s > first_s else 0.0}
        if gap_s := max(gap_s for at_s, _, gap_s in ticks if at_s > now_s - RATE_S):
            rates["gap_s"] = round(gap_s, 3)
        return rates | self._hit_rates() | self._ttfts(now_s)

    def _hit_rates(self) -> Frame:
        """Return which share of prompt tokens the prefix cache had: of the newest prompts, and since the start."""
        if (recent := self._metrics.recent.prefix_hit_rate) is None:
            return {}
        return {"hit_share": round(recent, 3), "hit_share_ever": round(self._metrics.prefix_hit_rate, 3)}

    def _ttfts(self, now_s: float) -> Frame:
        """Return the times to first token of the window.

        In an overload there may be none for long, which is when people look for them: then those of the last window
        that had any, with `ttft_at_s`, when it ended.
        """
        if (last_s := self._metrics.recent.last_first_token_s) is None:
            return {}
        is_old = last_s < now_s - TTFT_S
        ttfts = self._metrics.recent.ttfts((last_s if is_old else now_s) - TTFT_S)
        shown = {"ttft_p50_s": round(quantile(ttfts, 0.5), 3), "ttft_p99_s": round(quantile(ttfts, 0.99), 3)}
        return shown | ({"ttft_at_s": round(last_s, 3)} if is_old else {})


@dataclass(frozen=True, slots=True, eq=False)
class Viewer:
    """A client that watches: its stream of events, and how much of it was the past."""

    request: web.Request
    over: asyncio.Event  # set when it is to leave
    past_bytes: int = 0  # that it was sent at first: they are no update, and do not count as behind


class Feed:
    """Looks at the server while somebody watches, and tells all viewers what changed."""

    def __init__(self, state: Callable[[int], Mapping[str, Any]], metrics: Metrics, known: Mapping[str, Any]) -> None:
        self._state, self._metrics, self._known = state, metrics, known
        self._rates = RecentRates(metrics)
        self.viewers: set[Viewer] = set()
        self._sent: Frame = {}  # what every viewer knows
        self._past: deque[Frame] = deque(maxlen=NUM_PAST)
        self._ticker: asyncio.Task[None] | None = None
        self._rememberer: asyncio.Task[None] | None = None
        self.num_ticks, self.cpu_s = 0, 0.0  # since start, of this thread (scripts/bench/bench_feed.py)

    @property
    def num_viewers(self) -> int:
        """Return how many watch now."""
        return len(self.viewers)

    def _look(self) -> Frame:
        state = self._state(NUM_TRANSITIONS)
        return frame_of(state, **self._known, rates=self._rates.at(state["now_s"]))

    async def open(self, _: object = None) -> None:
        """Begin to remember rates: the server has started."""
        self._rememberer = asyncio.create_task(self._remember_on(), name="feed's past")

    async def _remember_on(self) -> None:
        while True:
            await asyncio.sleep(PAST_TICK_S)
            self.remember()

    def remember(self) -> None:
        """Keep what charts show of this moment."""
        if not self.viewers:
            self._sent = self._look()
        self._past.append({name: self._sent[name] for name in CHARTED})

    async def watch(self, request: web.Request) -> web.StreamResponse:
        """Send events until the viewer leaves or the server stops; the past first, if it is asked for."""
        if len(self.viewers) >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} viewers are watching already.", retry_after_s=5)
        past = _event("past", list(self._past)) if "past" in request.query else b""
        stream, viewer = EventStream(request, timeout_s=5.0), Viewer(request, asyncio.Event(), len(past))
        if not self.viewers:
            self._sent = self._look()
        try:
            await stream.open()
            if past:
                await request.writer.write(past)
            self.viewers.add(viewer)
            if self._ticker is None:
                self._ticker = asyncio.create_task(self._run(), name="feed")
            await request.writer.write(_event("snapshot", self._sent))  # in the buffer before any delta
            await viewer.over.wait()
            await stream.close()
        except ConnectionError:
            pass  # viewers come and go
        finally:
            self.viewers.discard(viewer)
        return stream.response

    async def close(self, _: object = None) -> None:
        """End all streams: the server stops."""
        for viewer in self.viewers:
            viewer.over.set()
        for task in (self._ticker, self._rememberer):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        """Tick while there are viewers: this is the feed's only clock."""
        try:
            while self.viewers:
                await asyncio.sleep(TICK_S)
                await self.tick()
        except Exception:
            log.exception("feed stopped")
            for viewer in self.viewers:
                viewer.over.set()
        finally:
            self._ticker = None

    async def tick(self) -> None:
        """Tell all viewers what changed since the last time; that time passed, only every `QUIET_S`."""
        started_s = time.thread_time()
        now = self._look()
        delta = delta_of(self._sent, now)
        if delta.keys() != {"at_s"} or now["at_s"] >= self._sent["at_s"] + QUIET_S:
            self._sent = now
            await self._send(_event("delta", delta))
        self.num_ticks += 1
        self.cpu_s += time.thread_time() - started_s

    async def _send(self, event: bytes) -> None:
        """Write to everybody. Does not wait: whose buffer is not nearly empty is cut off, not written to."""
        for viewer in list(self.viewers):
            transport = viewer.request.transport
            if transport is not None and transport.get_write_buffer_size() <= BEHIND_BYTES + viewer.past_bytes:
                try:
                    await viewer.request.writer.write(event)
                    continue
                except ConnectionError:
                    pass
            elif transport is not None:
                transport.abort()
            self.viewers.discard(viewer)
            viewer.over.set()


FEED = web.AppKey("feed", Feed)


async def events(request: web.Request) -> web.StreamResponse:
    """Answer GET /kunserve/events: events `snapshot` (a frame) and `delta` (a merge patch of the one before).

    With `?past`, first `past`: of the last two minutes a frame each second, or as much of it as charts show.
    """
    return await request.app[FEED].watch(request)


def _event(name: str, value: Mapping[str, Any] | Sequence[Frame]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(value))
