"""Parts in a process of their own, started anew after one that failed: a fault, a hang or a leak costs no other part.

The worker is told names on stdin, one a line, and answers each with a line of JSON. What a part `tell`s is sent at
once, as {"told": ...}: figures that are known outlive whatever the part still does, such as closing a device.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

CheckPart = Callable[[], dict[str, Any]]
Result = dict[str, Any]

_answers: list[TextIO] = []  # in a worker, where they go


def serve(parts: Mapping[str, CheckPart]) -> None:
    """Run the parts that stdin names, in the worker."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what else is printed does not get among the answers
        _answers.append(answers)
        for line in sys.stdin:
            print(json.dumps(_run(parts[line.strip()]), default=str), file=answers, flush=True)


def tell(figures: Result) -> Result:
    """Send figures of the part that runs, now; returns them."""
    for answers in _answers:
        print(json.dumps({"told": figures}, default=str), file=answers, flush=True)
    return figures


def _run(part: CheckPart) -> Result:
    begun = time.perf_counter()
    try:
        result = part()
    except Exception as error:
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.perf_counter() - begun, 2)}


class Worker:
    """The other end: a process, and the lines that it answers."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put("")  # it has ended

    def run(self, name: str, limit_s: float) -> Result:
        """Run a part and return its result; "failed", and what it had told, if it raised, died or ran too long."""
        assert self._process.stdin is not None
        told: Result = {}
        ends_at = time.monotonic() + limit_s
        try:
            print(name, file=self._process.stdin, flush=True)
            while answer := self._answers.get(timeout=max(ends_at - time.monotonic(), 0.0)):
                result: Result = json.loads(answer)
                if "told" not in result:
                    return told | result
                told |= result["told"]
        except queue.Empty:
            return told | {"failed": f"stopped after {limit_s:.0f} s"}
        except BrokenPipeError:
            pass
        return told | {"failed": f"its process ended with status {self._process.wait()}"}

    def close(self) -> None:
        """End the process and what it has started, whatever they do."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def run_parts(
    names: Sequence[str], command: Sequence[str], *, budget_s: float, limit_s: float, part_limit_s: float
) -> Iterator[tuple[str, Result]]:
    """Run parts one after the other; what fails or finds no time is recorded as that.

    None begins after `budget_s`, none runs beyond `limit_s`, nor for longer than `part_limit_s`.
    """
    started, worker = time.monotonic(), None
    try:
        for name in names:
            passed_s = time.monotonic() - started
            if passed_s > budget_s:
                yield name, {"skipped": f"no time left: {budget_s:.0f} s are over"}
                continue
            worker = worker or Worker(command)
            result = worker.run(name, min(part_limit_s, limit_s - passed_s))
            if "failed" in result:
                worker.close()
                worker = None
            yield name, result
    finally:
        if worker is not None:
            worker.close()
