"""What runs when, on GPUs that are not there: streams, events, captures, and the memory that work uses.

Work lies in its stream until somebody waits; then streams go on in random order, as far as events let them. So whatever
is ordered by luck alone comes in the wrong order sooner or later: a piece of work that touches memory which earlier
work of another stream has not done with breaks a rule. Memory is known by its addresses, whatever it is part of.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from weakref import ref

from fake_pieces import Event, Mark, Piece, Recording, RuleBrokenError, Span, StreamOwner, StreamState

from kunserve.errors import DeviceError


class Block:
    """Memory of torch's allocator: used again on its stream as soon as nobody holds it, and who reads it be damned."""

    def __init__(self, timeline: Timeline, span: Span, stream: int, of: object = None, is_pinned: bool = False) -> None:
        self.memory = of  # what has the bytes: nobody else gets them before `freed` has looked who reads them
        self.timeline, self.span, self.stream, self.is_pinned = timeline, span, stream, is_pinned
        self.used_on: set[int] = set()  # streams that have copied it, if it is pinned
        self.made_in = timeline.recording()  # memory of a graph stays its own
        self.test = timeline.test

    def __del__(self) -> None:
        self.timeline.freed(self)


class _Nobody:
    """Whose the legacy streams are."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.error: str | None = None


class Timeline:
    """All streams of a machine. `broken`: what could not be raised where it was found."""

    def __init__(self) -> None:
        self.change = threading.Condition(threading.RLock())
        self.broken: list[str] = []
        self.copies: list[tuple[int, int]] = []  # between GPUs: the streams that were current on both
        self.default_uses = 0  # launches on default streams
        self._streams: dict[int, StreamState] = {}
        self._legacy: dict[int, int] = {}  # of each GPU: what torch launches on where no stream is current
        self._ids, self._numbers = itertools.count(1), itertools.count(1)
        self._random, self._is_legacy_late = random.Random(0), True
        self._recordings: dict[int, Recording] = {}
        self._captured_event: str | None = None  # torch's host allocator has met one: it fails from then on
        self._thread = threading.local()
        self.test = 0  # how many have begun: what one has left ends with the next collection, in another

    def begin(self, seed: int) -> None:
        """Forget what other tests have left, and draw another order.

        At even seeds what lies in default streams runs last: whoever relies on it without saying so is found at once.
        """
        with self.change:
            self._random.seed(seed)
            self._is_legacy_late = seed % 2 == 0
            self.default_uses, self._thread.gpu, self.test = 0, 0, self.test + 1
            self.broken.clear()
            self.copies.clear()
            self._captured_event = None

    # --- streams ---------------------------------------------------------------------------------------------------

    def create(self, owner: StreamOwner, *, is_blocking: bool = False) -> int:
        """Make a stream. If it is blocking, it and the legacy stream of its GPU wait for each other."""
        with self.change:
            stream = next(self._ids)
            self._streams[stream] = StreamState(owner, is_blocking=is_blocking)
            return stream

    def take(self, stream: int, owner: StreamOwner) -> None:
        """Give a stream that nobody has to another device."""
        with self.change:
            state = self._state(stream)
            assert not state.queue
            state.owner, state.num_submitted, state.num_done = owner, 0, 0

    def destroy(self, stream: int) -> None:
        """End a stream. Its number is not used again, as CUDA does: then nobody would see what comes too late."""
        with self.change:
            self._state(stream).is_destroyed = True

    def is_idle(self, stream: int) -> bool:
        """Return whether all that was launched has run."""
        return not self._state(stream).queue

    def ordinal(self, stream: int) -> int:
        """Return the GPU of a stream."""
        return self.owner(stream).ordinal

    def owner(self, stream: int) -> StreamOwner:
        """Return what a stream belongs to."""
        return self._state(stream).owner

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Let this thread launch on `stream` what it launches on that GPU, which is current."""
        ordinal, current = self.ordinal(stream), self._current()
        before, before_gpu = current.get(ordinal), getattr(self._thread, "gpu", 0)
        current[ordinal], self._thread.gpu = stream, ordinal
        try:
            yield
        finally:
            self._thread.gpu = before_gpu
            if before is None:
                del current[ordinal]
            else:
                current[ordinal] = before

    @property
    def current_gpu(self) -> int:
        """The GPU that is current in this thread."""
        return getattr(self._thread, "gpu", 0)

    def make_current(self, ordinal: int) -> None:
        """Make a GPU current in this thread, as every call of its driver does: nobody makes another so behind it."""
        self._thread.gpu = ordinal

    def current(self, ordinal: int) -> int:
        """Return the stream on which this thread launches on a GPU."""
        return self._current().get(ordinal) or self.legacy(ordinal)

    def legacy(self, ordinal: int) -> int:
        """Return the default stream of a GPU: only those that are blocking wait for it, and it for them."""
        with self.change:
            if ordinal not in self._legacy:
                self._legacy[ordinal] = self.create(_Nobody(ordinal))
            return self._legacy[ordinal]

    def launch(
        self,
        stream: int,
        run: Callable[[], object] | None = None,
        reads: Sequence[Span] = (),
        writes: Sequence[Span] = (),
        *,
        is_held: bool = False,
    ) -> None:
        """Put work into a stream."""
        self._put(Piece(stream, run=run, reads=tuple(reads), writes=tuple(writes), is_held=is_held))

    def record(self, stream: int, *, is_timed: bool = False) -> Event:
        """Record an event behind all that was launched."""
        mark = Mark(stream, is_captured=stream in self._recordings, test=self.test, is_timed=is_timed)
        self._put(Piece(stream, reaches=mark))
        return Event(mark, self._event_ended)

    def wait(self, stream: int, event: Event) -> None:
        """Let what is launched on `stream` from now on wait for an event."""
        with self.change:
            mark = event.mark
            if mark.is_captured != (stream in self._recordings):
                raise RuleBrokenError("what is in a capture and what is not may not wait for each other")
            if not mark.is_reached:
                mark.num_waiting += 1
                self._put(Piece(stream, after=mark))

    def _event_ended(self, mark: Mark) -> None:
        """Nobody can name the event any more: none may have been waiting for it. After a fault nobody is."""
        with self.change:
            if not mark.is_open or mark.test != self.test or self._streams[mark.stream].owner.error:
                return
            sound = (state for state in self._streams.values() if not state.owner.error)
            if any(piece.after is mark for state in sound for piece in state.queue):
                self.broken.append(f"an event of stream {mark.stream} was destroyed while a stream waits for it")

    def _put(self, piece: Piece) -> None:
        with self.change:
            state, mine = self._state(piece.stream), self.recording()
            recording = self._recordings.get(piece.stream)
            if recording is not mine:
                where = "is being captured by another thread" if recording else "is not what this thread captures"
                raise RuleBrokenError(f"work was launched on stream {piece.stream}, which {where}")
            if recording is not None:
                recording.pieces.append(piece)
                return
            for other in self._waited_for_unsaid(piece.stream, state):
                self._wait_unsaid(piece.stream, other)
            piece.number = next(self._numbers)
            state.queue.append(piece)
            state.num_submitted += piece.is_held
            self.change.notify_all()

    def wait_as_torch(self, stream: int, other: int) -> None:
        """Let a stream wait for all that lies in another, as torch's own copies do: their events go at once."""
        with self.change:
            self.forbid_in_capture("copy between GPUs")
            self._wait_unsaid(stream, other)

    def _wait_unsaid(self, stream: int, other: int) -> None:
        mark = Mark(other, num_waiting=1)
        for piece in (Piece(other, reaches=mark), Piece(stream, after=mark)):
            piece.number = next(self._numbers)
            self._state(piece.stream).queue.append(piece)

    def _waited_for_unsaid(self, stream: int, state: StreamState) -> list[int]:
        """Return the streams that CUDA lets the next launch on `stream` wait for without being told."""
        ordinal = state.owner.ordinal
        legacy = self._legacy.get(ordinal)
        if stream == legacy:
            self.default_uses += 1
            if any(self.ordinal(captured) == ordinal for captured in self._recordings):
                self._break("the default stream was used while a stream of its GPU was captured")
            mine = ((i, s) for i, s in self._streams.items() if s.is_blocking and s.owner.ordinal == ordinal)
            return [i for i, s in mine if s.queue]
        return [legacy] if state.is_blocking and legacy is not None and self._streams[legacy].queue else []

    # --- running ---------------------------------------------------------------------------------------------------

    def synchronize(self, event: Event, owner: StreamOwner) -> None:
        """Block until an event is reached, or `owner` has faulted: DeviceError."""
        with self.change:
            self.forbid_in_capture("wait for the GPU")
            mark = event.mark
            if mark.stream in self._recordings or mark.is_captured:
                raise DeviceError(f"cuda:{owner.ordinal}: CUDA_ERROR_CAPTURED_EVENT")
            while not (mark.is_reached or owner.error):
                if not self._run_one():
                    self.change.wait()
            if owner.error:
                raise DeviceError(f"cuda:{owner.ordinal}: cuEventSynchronize failed: {owner.error}")

    def drain(self) -> None:
        """Run all that can run."""
        with self.change:
            while self._run_one():
                pass

    def release(self, stream: int, count: int) -> None:
        """Let the oldest held pieces of a stream end, now."""
        with self.change:
            state = self._state(stream)
            assert state.num_done + count <= state.num_submitted
            wanted = state.num_done + count
            while state.num_done < wanted:
                head = state.queue[0]
                if head.after is not None and not head.after.is_reached:
                    raise RuleBrokenError("a kernel ran before the event that it waits for")
                self._run(state)
            while state.queue and state.queue[0].reaches:
                self._run(state)
            self.change.notify_all()

    def forget_work(self) -> None:
        """Let nothing be left of a test that has broken a rule."""
        with self.change:
            for state in self._streams.values():
                for piece in state.queue:
                    if piece.reaches is not None:
                        piece.reaches.is_reached = True
                    if piece.after is not None:
                        piece.after.num_waiting -= 1
                state.queue.clear()

    def counts(self, stream: int) -> tuple[int, int]:
        """Return how many pieces that are held were launched, and how many have ended."""
        state = self._state(stream)
        return state.num_submitted, state.num_done

    def _run_one(self) -> bool:
        ready = [s for s in self._streams.values() if s.queue and not s.owner.error and _can_run(s.queue[0])]
        if self._is_legacy_late:
            ready = [s for s in ready if not isinstance(s.owner, _Nobody)] or ready
        if ready:
            self._run(self._random.choice(ready))
        return bool(ready)

    def _run(self, state: StreamState) -> None:
        piece = state.queue[0]
        self._check_order(piece)
        if piece.run is not None:
            try:
                piece.run()
            except RuleBrokenError as error:
                self.broken.append(str(error))
                raise
            except Exception as error:  # on a GPU the host is far away by then
                state.owner.error = f"CUDA_ERROR_ASSERT ({type(error).__name__}: {error})"
        state.queue.popleft()
        state.num_done += piece.is_held
        if piece.reaches is not None:
            piece.reaches.is_reached, piece.reaches.reached_s = True, perf_counter()
        if piece.after is not None:
            piece.after.num_waiting -= 1
        self.change.notify_all()

    def _check_order(self, piece: Piece) -> None:
        """What was launched earlier on other streams, and has not run, must have nothing to do with it."""
        if not (piece.reads or piece.writes):
            return
        for stream, state in self._streams.items():
            for earlier in state.queue if stream != piece.stream else ():
                if earlier.number > piece.number:
                    break
                if _overlap(earlier.writes, piece.reads):
                    self._break(f"stream {piece.stream} reads what stream {stream} has not written yet")
                if _overlap(earlier.writes, piece.writes) or _overlap(earlier.reads, piece.writes):
                    self._break(f"stream {piece.stream} writes over what stream {stream} has not done with")

    def _break(self, rule: str) -> None:
        self.broken.append(rule)
        raise RuleBrokenError(rule)

    # --- captures --------------------------------------------------------------------------------------------------

    @contextmanager
    def capture(self, stream: int) -> Iterator[Recording]:
        """Record what this thread launches on `stream`, and run nothing of it."""
        with self.change:
            self.forbid_in_capture("begin another capture")
            if stream in self._legacy.values():
                raise RuleBrokenError("the default stream cannot be captured")
            recording = self._recordings[stream] = Recording(stream, threading.get_ident())
        self._thread.recording = recording
        try:
            yield recording
        finally:
            self._thread.recording = None
            with self.change:
                del self._recordings[stream]

    def replay(self, recording: Recording, stream: int) -> None:
        """Launch again what was recorded."""
        for span, block in recording.needed:
            if block() is None:
                self._break(f"a graph uses memory that was freed: {span}")
        for piece in recording.pieces:
            self._put(Piece(stream, run=piece.run, reads=piece.reads, writes=piece.writes))

    def uses(self, block: Block, stream: int) -> None:
        """Remember what a launch needs: a graph does again what it has done with the same addresses."""
        recording = self._recordings.get(stream)
        if recording is not None and block.made_in is not recording:
            recording.needed.append((block.span, ref(block)))

    def forbid_in_capture(self, what: str) -> None:
        """Break the rule if this thread captures."""
        if self.recording() is not None:
            raise RuleBrokenError(f"no thread may {what} while it captures")

    def recording(self) -> Recording | None:
        """Return what this thread captures."""
        recording: Recording | None = getattr(self._thread, "recording", None)
        return recording

    # --- memory ----------------------------------------------------------------------------------------------------

    def pinned_may_be_taken(self) -> None:
        """RuntimeError, as torch has it, if its host allocator looks at an event of a capture."""
        if self._captured_event is not None:
            raise RuntimeError(self._captured_event)

    def freed(self, block: Block) -> None:
        """Torch has its memory back: what is launched on its stream from now on may be given it."""
        with self.change:
            if block.test != self.test:
                return
            if block.is_pinned:  # it records an event on each of them, now
                for stream in block.used_on:
                    if self._streams[stream].is_destroyed:
                        self.broken.append(f"stream {stream} was destroyed before a pinned buffer that it has copied")
                    if stream in self._recordings:
                        self._captured_event = "operation not permitted on an event last recorded in a capturing stream"
                        self.broken.append(self._captured_event)  # an engine may go on after what is raised then
                return
            if block.made_in is not None:
                return
            for stream, state in self._streams.items():
                if stream == block.stream or state.owner.error:  # nothing runs any more after a fault
                    continue
                if state.queue and any(_overlap((block.span,), piece.reads) for piece in state.queue):
                    self.broken.append(f"memory of stream {block.stream} was freed while stream {stream} reads it")

    def is_written(self, span: Span) -> bool:
        """Return whether work that has not run will write there."""
        with self.change:
            return any(_overlap((span,), piece.writes) for state in self._streams.values() for piece in state.queue)

    def _state(self, stream: int) -> StreamState:
        state = self._streams.get(stream)
        if state is None or state.is_destroyed:
            raise RuleBrokenError(f"there is no stream {stream}")
        return state

    def _current(self) -> dict[int, int]:
        if not hasattr(self._thread, "current"):
            self._thread.current = {}
        current: dict[int, int] = self._thread.current
        return current


def _can_run(piece: Piece) -> bool:
    return not piece.is_held and (piece.after is None or piece.after.is_reached)


def _overlap(a: Sequence[Span], b: Sequence[Span]) -> bool:
    return any([x.start < y.end and y.start < x.end for x in a for y in b])  # noqa: C419  a generator is slower


TIMELINE = Timeline()  # of this process: events of one GPU are waited for on others


def take_broken() -> str:
    """Return what was found where nothing could be raised, which is forgiven."""
    broken = "; ".join(TIMELINE.broken)
    TIMELINE.broken.clear()
    return broken
