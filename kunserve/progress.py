"""Progress of loading: a bar on a terminal, plain lines elsewhere; the page asks for the newest."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import Progress


class LoadingProgress:
    """Shows what is being done and how far it is. Plain lines come once per text and at each quarter.

    `newest` is what was shown last, read by any thread.
    """

    def __init__(self) -> None:
        self.newest = ("starting", 0.0)
        self._bar = Progress(console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task("starting", total=1.0)
        self._last = ("", -1)

    def update(self, text: str, share: float) -> None:
        """Show `text` at `share` (0 to 1) of its work."""
        self.newest = (text, share)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, completed=share)
        elif (text, int(share * 4)) != self._last:
            self._last = (text, int(share * 4))
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
