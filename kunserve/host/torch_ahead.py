"""What can be done about the time that importing torch takes, before it is imported. Without torch."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path


def hasten_torch() -> None:
    """Have a thread link torch's largest library; nothing without torch, or where it is imported already.

    No module of torch is put off: some set up what others need, which import them for nothing else.
    """
    spec = None if "torch" in sys.modules else find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    threading.Thread(target=_link, args=(folder / "lib",), name="torch-ahead", daemon=True).start()


def _link(folder: Path) -> None:
    # By way of the function, as a call of one drops the GIL and `ctypes.CDLL(path)` does not. Best effort: whatever is
    # wrong with the libraries, the import says it.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    dlopen(os.fsencode(folder / "libtorch_global_deps.so"), os.RTLD_GLOBAL | os.RTLD_NOW)
    dlopen(os.fsencode(folder / "libtorch_cpu.so"), os.RTLD_LAZY)
