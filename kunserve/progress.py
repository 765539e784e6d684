"""Progress of loading: a bar on a terminal, plain lines elsewhere; the page asks for the newest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

import rich.progress
from rich.console import Console

Progress = Callable[[str, float], None]  # what is being done, share of it done

LINE_EVERY_S = 30.0


class LoadingProgress:
    """Shows what is being done and how far it is; any thread may say it, and read the `newest`.

    Plain lines come once per text, at each quarter and, between those, every half minute: a log that is silent for the
    minutes of a download looks like a server that hangs.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.newest = ("starting", 0.0)
        is_bar = sys.stderr.isatty()
        self._bar = rich.progress.Progress(console=Console(stderr=True), transient=True) if is_bar else None
        self._task = None if self._bar is None else self._bar.add_task("starting", total=1.0)
        self._clock = clock
        self._last, self._last_s = ("", -1), 0.0

    def update(self, text: str, share: float) -> None:
        """Show `text` at `share` (0 to 1) of its work."""
        self.newest = (text, share)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, completed=share)
            return
        now_s = self._clock()
        if (text, int(share * 4)) != self._last or now_s - self._last_s >= LINE_EVERY_S:
            self._last, self._last_s = (text, int(share * 4)), now_s
            print(f"{text}: {share:.0%}" if share else text, file=sys.stderr, flush=True)

    def __enter__(self) -> LoadingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
