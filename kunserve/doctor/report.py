"""All checks in order, what follows from them together, and how that is shown: one screen, or one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from kunserve.doctor.caches import check_hub, check_server_cache
from kunserve.doctor.cards import check_models
from kunserve.doctor.finding import CPU, CUDA, Finding, Status, first_line
from kunserve.doctor.gpus import Gpus, check_gpus, check_peer_access, find_gpus
from kunserve.doctor.host import (
    check_cpu_devices,
    check_locked_memory,
    check_mappings,
    check_memory,
    check_open_files,
    check_system,
)
from kunserve.doctor.kernels import check_compiler, check_flashinfer, check_triton
from kunserve.doctor.packages import check_packages, check_structured, check_torch
from kunserve.doctor.probe import Probe

CHECKS: Mapping[str, Callable[[Probe, Gpus], Finding]] = {
    "KunServe": check_system,
    "packages": check_packages,
    "torch": check_torch,
    "GPUs": check_gpus,
    "FlashInfer": check_flashinfer,
    "Triton": check_triton,
    "peer access": check_peer_access,
    "CPU devices": check_cpu_devices,
    "C compiler": check_compiler,
    "host memory": check_memory,
    "locked memory": check_locked_memory,
    "mappings": check_mappings,
    "open files": check_open_files,
    "server cache": check_server_cache,
    "Hub": check_hub,
    "models": check_models,
    "structured": check_structured,
}
COLORS = {Status.OK: 32, Status.WARNING: 33, Status.MISSING: 35, Status.PROBLEM: 31}
WIDTH, NAME_WIDTH, STATUS_WIDTH, INDENT = 79, 14, 8, 4


def examine(probe: Probe) -> dict[str, Finding]:
    """Run all checks. A check that fails itself is a finding too: whoever calls a doctor has something broken."""
    try:
        gpus = find_gpus(probe)
    except Exception as error:
        gpus = Gpus(fault=_failed(error, frozenset({CUDA})))
    return {name: _examined(check, probe, gpus) for name, check in CHECKS.items()}


def _examined(check: Callable[[Probe, Gpus], Finding], probe: Probe, gpus: Gpus) -> Finding:
    try:
        return check(probe, gpus)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception, prevents: frozenset[str] = frozenset()) -> Finding:
    found = f"could not be looked at: {first_line(error)}"
    return Finding(Status.PROBLEM, found, "what it is about may fail", "mend what the message names", prevents)


def prevented(findings: Mapping[str, Finding]) -> dict[str, list[str]]:
    """Return, for each kind of devices, the checks that say that no server can start on it."""
    return {kind: [name for name, one in findings.items() if kind in one.prevents] for kind in (CPU, CUDA)}


def can_start(findings: Mapping[str, Finding]) -> bool:
    """Tell whether a server can start on devices of some kind."""
    return not all(prevented(findings).values())


def as_json(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """Return all that is known, for programs."""
    reasons = prevented(findings)
    checks = [
        {
            "name": name,
            "status": str(one.status),
            "found": one.found,
            "consequence": one.consequence or None,
            "remedy": one.remedy or None,
            "prevents": sorted(one.prevents),
            "details": dict(one.details),
        }
        for name, one in findings.items()
    ]
    return {
        "can_start": {kind: not names for kind, names in reasons.items()},
        "prevented_by": reasons,
        "checks": checks,
    }


def as_screen(findings: Mapping[str, Finding], *, has_colors: bool) -> Iterator[str]:
    """Yield the lines of the screen. Checks in a row that found the same share one."""
    for _, group in groupby(findings.items(), key=lambda item: (item[1].status, item[1].found)):
        names, (one, *_) = zip(*group, strict=True)
        start, mark = f"{', '.join(names):<{NAME_WIDTH - 1}} ", f"{one.status:<{STATUS_WIDTH}}"
        indent = " " * (NAME_WIDTH + STATUS_WIDTH)
        first, *rest = textwrap.wrap(start + mark + one.found, WIDTH, subsequent_indent=indent)
        if has_colors:
            first = f"{start}\033[{COLORS[one.status]}m{one.status}\033[0m{first[len(start + one.status) :]}"
        yield from (first, *rest)
        if one.status is not Status.OK:
            indent = " " * INDENT
            text = f"{one.consequence} -> {one.remedy}"
            yield from textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    yield from textwrap.wrap(verdict(findings), WIDTH)


def verdict(findings: Mapping[str, Finding]) -> str:
    """Say on what a server can start, which decides the exit status, and which checks forbid the rest."""
    reasons, words = prevented(findings), {CUDA: "GPUs", CPU: "CPU devices"}
    works = " and ".join(text for kind, text in words.items() if not reasons[kind])
    refused = "; ".join(f"not on {words[kind]} (see {', '.join(names)})" for kind, names in reasons.items() if names)
    if not works:
        return f"No server can start here: {refused}."
    advice = ""
    if reasons[CUDA] and findings["torch"].details.get("cuda_is_available"):
        advice = " Without --devices cpu:2 it would choose the GPUs and fail."
    return f"A server can start here on {works}{f'; {refused}' if refused else ''}.{advice}"
