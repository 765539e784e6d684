"""What can be done about the time that importing torch takes, before it is imported. Without torch."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

# Shapes of operations on meta tensors, for those who compile models: a third of the import, and no use to a server.
PUT_OFF = "torch._meta_registrations"


def hasten_torch() -> None:
    """Have a thread link torch's largest library, and put off what CPU devices never use; nothing without torch."""
    spec = None if "torch" in sys.modules else find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    put_off(PUT_OFF, folder / f"{PUT_OFF.rpartition('.')[2]}.py")
    threading.Thread(target=_link, args=(folder / "lib",), name="torch-ahead", daemon=True).start()


def put_off(name: str, path: Path) -> None:
    """Let an import of a module find one that runs its file only when something of it is asked for."""
    spec = spec_from_file_location(name, path) if path.exists() else None
    if spec is not None:
        sys.modules[name] = _later(spec)


def _later(spec: ModuleSpec) -> ModuleType:
    module, loader = module_from_spec(spec), spec.loader
    assert loader is not None

    def load(attribute: str) -> Any:
        if attribute.startswith("__"):  # the importing itself asks for such
            raise AttributeError(attribute)
        del module.__getattr__
        loader.exec_module(module)
        return getattr(module, attribute)

    module.__getattr__ = load  # type: ignore[method-assign]
    return module


def _link(folder: Path) -> None:
    # By way of the function, as a call of one drops the GIL and `ctypes.CDLL(path)` does not. Best effort: whatever is
    # wrong with the libraries, the import says it.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    dlopen(os.fsencode(folder / "libtorch_global_deps.so"), os.RTLD_GLOBAL | os.RTLD_NOW)
    dlopen(os.fsencode(folder / "libtorch_cpu.so"), os.RTLD_LAZY)
