"""Model files: what the Hub's library shows while it downloads -> the server's own progress."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from huggingface_hub.utils import tqdm

from kunserve.progress import Progress
from kunserve.sizes import format_size

LIBRARY_LOGGER = "huggingface_hub"


class DownloadProgress:
    """Shows one download: `bar_class` counts for the library's bars, its warnings are texts of the progress.

    Within the block the library writes nothing to stderr itself. Its threads may all report at once.
    """

    def __init__(self, hub_id: str, progress: Progress) -> None:
        self._text = f"downloading {hub_id}"
        self._progress = progress
        self._num_bytes = self._total_bytes = 0
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self.bar_class = self._make_bar_class()

    def expect(self, total_bytes: int) -> None:
        """Say how much there is to come."""
        self._total_bytes = total_bytes
        self._text = f"{self._text} ({format_size(total_bytes)})"
        self._show(self._text)

    def __enter__(self) -> DownloadProgress:
        self._show(self._text)
        logger = logging.getLogger(LIBRARY_LOGGER)
        before = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [_Handler(self._say)], False
        self._stack.callback(_restore, logger, *before)
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of little room, which we refuse ourselves
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _make_bar_class(self) -> type:
        """Return a class of bars that show nothing and count here. Some versions have two bars for the same bytes."""
        shown = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})
                self._counts_bytes = kwargs.get("unit") == "B"
                self._num_bytes = 0

            def update(self, n: float | None = 1) -> None:
                if self._counts_bytes:
                    with shown._lock:
                        self._num_bytes += int(n or 0)
                        shown._count(self._num_bytes)

        return Bar

    def _count(self, num_bytes: int) -> None:
        if num_bytes > self._num_bytes and self._total_bytes:
            self._num_bytes = num_bytes
            self._show(self._text)

    def _say(self, warning: str) -> None:
        self._show(f"{self._text}: {warning}")

    def _show(self, text: str) -> None:
        share = self._num_bytes / self._total_bytes if self._total_bytes else 0.0
        self._progress(text, min(share, 1.0))


class _Handler(logging.Handler):
    """Gives each of the library's warnings to a function, as one line without the secrets of signed addresses."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one warning on."""
        self._say(re.sub(r"\?\S*", "", " ".join(record.getMessage().split())))


def _restore(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> None:
    logger.handlers, logger.propagate = handlers, propagate
