"""Checks of the folders that a server writes to: its own cache, and the Hugging Face Hub's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kunserve.doctor.finding import Finding, Status, first_line, ok
from kunserve.doctor.gpus import GIB, Gpus
from kunserve.doctor.packages import bound_of, check_late_package
from kunserve.doctor.probe import Probe
from kunserve.errors import KunServeError

LEAST_FREE_BYTES = GIB  # the embedded model's wheel and its converted copy
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # in the order in which the Hub's library looks


def hub_cache(probe: Probe) -> Path:
    """Return the Hub's folder of models."""
    return Path(_hub_constants(probe).HF_HUB_CACHE)


def check_server_cache(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether converted models and compiled kernels can be kept."""
    consequence = "smollm2-135m cannot be prepared, and CPU kernels cannot be compiled"
    remedy = "KUNSERVE_CACHE=FOLDER kunserve serve ..."
    try:
        folder = probe.cache_root()
    except (RuntimeError, KunServeError) as error:  # a "~user" that nobody is
        found, value = first_line(error), probe.environment.get("KUNSERVE_CACHE", "")
        if "KUNSERVE_CACHE" not in found:
            found = f"KUNSERVE_CACHE={value} names no folder: {found}"
        return Finding(Status.PROBLEM, found, consequence, remedy)
    return _check_folder(probe, folder, consequence, remedy)


def check_hub(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether models can be fetched from the Hub and kept, and who asks for them."""
    bound = bound_of(probe, "huggingface-hub")
    consequence = "only folders and smollm2-135m are served"
    if finding := check_late_package(probe, bound, "kunserve.model.hub.snapshot", consequence):
        return finding
    constants, remedy = _hub_constants(probe), "HF_HOME=FOLDER kunserve serve ..."
    finding = _check_folder(probe, hub_cache(probe), "models cannot be downloaded", remedy)
    has_token, is_offline = _has_token(probe), bool(constants.HF_HUB_OFFLINE)
    details = {**finding.details, "version": bound.installed, "has_token": has_token, "is_offline": is_offline}
    if finding.status is not Status.OK:
        return Finding(finding.status, finding.found, finding.consequence, finding.remedy, details=details)
    found = f"{finding.found}, {'a' if has_token else 'no'} token"
    if is_offline:
        consequence = "a model that is not on this machine is not fetched"
        name = next((name for name in OFFLINE if probe.environment.get(name)), OFFLINE[0])
        return Finding(Status.WARNING, f"{found}, {name} is set", consequence, f"unset {name}", details=details)
    if not bound.is_met:
        consequence, remedy = "downloads may fail: KunServe was not made for this version", bound.remedy
        return Finding(Status.WARNING, bound.text, consequence, remedy, details=details)
    return ok(found, **details)


def _check_folder(probe: Probe, folder: Path, consequence: str, remedy: str) -> Finding:
    """Check whether files can be put into a folder, which need not exist yet."""
    # Path.exists raises where a parent may not be looked into.
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free, size = probe.free_bytes(existing), _num_bytes(folder)
    name = str(folder)
    if folder.is_relative_to(probe.home):
        name = f"~/{folder.relative_to(probe.home)}"
    details = {"folder": str(folder), "bytes": size, "free_bytes": free}
    if not existing.is_dir() or not probe.is_writable(existing):
        found = f"{name} cannot be written to"
        return Finding(Status.PROBLEM, found, consequence, remedy, details=details)
    found = f"{name}, {size / GIB:.1f} GiB, {free / GIB:,.0f} GiB free"
    if free < LEAST_FREE_BYTES:
        return Finding(Status.WARNING, found, f"disk nearly full: {consequence}", remedy, details=details)
    return ok(found, **details)


def _num_bytes(folder: Path) -> int:
    """Return what the files under a folder take on disk; a link counts as itself, as the Hub's lead to its blobs."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # somebody else removed it meanwhile
                continue
    return total


def _hub_constants(probe: Probe) -> Any:
    """Return what the Hub's library has made of its environment variables. It is imported here, as it may be broken."""
    return probe.import_module("huggingface_hub.constants")


def _has_token(probe: Probe) -> bool:
    """Tell whether the Hub is told who asks. The token itself is read by nobody here."""
    return bool(probe.environment.get("HF_TOKEN")) or os.path.exists(_hub_constants(probe).HF_TOKEN_PATH)
