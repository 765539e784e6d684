"""Simulations that are kept in a folder, by their options and the code that ran them: none is run twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import kunserve
from kunserve.log import set_up_logging
from kunserve.sim.options import Options, simulate


@cache
def code_version() -> str:
    """Return a digest of the package: results of other code are not this code's."""
    root = Path(kunserve.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".toml", ".json"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def kept_run(options: Options, out: Path, keep: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return what `keep` takes from a simulation's report: from `out` if it has been run, with the same `keep`."""
    key = sha256(json.dumps(asdict(options), sort_keys=True, default=str).encode()).hexdigest()[:20]
    path = out / f"{code_version()}-{key}.json"
    if not path.exists():
        set_up_logging("error", as_json=False)
        kept = keep(simulate(options))
        path.with_suffix(".part").write_text(json.dumps({"options": asdict(options), "report": kept}, default=str))
        path.with_suffix(".part").rename(path)
    found: dict[str, Any] = json.loads(path.read_text())["report"]
    return found
