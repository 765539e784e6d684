"""How the interpreter of a process that serves shares its time: between threads, and with its garbage collector."""

from __future__ import annotations

import gc
import sys

# A thread may keep the GIL for this long while others wait: the event loop asks for it again after each system call.
GIL_SWITCH_S = 0.0005
# Objects that come before the young ones are looked at: those of a step of hundreds of streams die with it.
YOUNG_OBJECTS = 10_000


def set_up_interpreter() -> None:
    """Prepare to serve: what is loaded stays, so that collections need not look at it again, nor hold up the loop."""
    sys.setswitchinterval(GIL_SWITCH_S)
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    gc.freeze()
    gc.enable()  # a server had turned it off for its start
