"""Checks of the folders that a server writes to: its own cache, and the Hugging Face Hub's."""

from __future__ import annotations

import os
from pathlib import Path

from kunserve.doctor.finding import Finding, Status, ok
from kunserve.doctor.gpus import GIB, Gpus
from kunserve.doctor.packages import bounds
from kunserve.doctor.probe import Probe

LEAST_FREE_BYTES = GIB  # the embedded model's wheel and its converted copy
TRUE = ("1", "true", "yes", "on")


def server_cache(probe: Probe) -> Path:
    """Return the folder of converted models and compiled kernels."""
    return Path(probe.environment.get("KUNSERVE_CACHE") or probe.home / ".cache" / "kunserve").expanduser()


def hub_cache(probe: Probe) -> Path:
    """Return the Hub's folder of models, as huggingface_hub finds it."""
    if folder := probe.environment.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    return _hub_home(probe) / "hub"


def check_server_cache(probe: Probe, gpus: Gpus) -> Finding:
    """Whether converted models and compiled kernels can be kept."""
    folder = server_cache(probe)
    consequence = "smollm2-135m cannot be prepared, and CPU kernels cannot be compiled"
    return _check_folder(probe, folder, consequence, "KUNSERVE_CACHE=FOLDER kunserve serve ...")


def check_hub(probe: Probe, gpus: Gpus) -> Finding:
    """Whether models can be fetched from the Hub and kept, and who asks for them."""
    (bound,) = bounds(probe, "hub")
    if bound.installed is None:
        consequence = "only folders and smollm2-135m are served"
        remedy = "pip install 'kunserve[hub]'"
        return Finding(Status.MISSING, f"{bound.name} is not installed", consequence, remedy)
    remedy = "HF_HOME=FOLDER kunserve serve ..."
    finding = _check_folder(probe, hub_cache(probe), "models cannot be downloaded", remedy)
    has_token, is_offline = _has_token(probe), probe.environment.get("HF_HUB_OFFLINE", "0").lower() in TRUE
    details = {**finding.details, "version": bound.installed, "has_token": has_token, "is_offline": is_offline}
    if finding.status is not Status.OK:
        return Finding(finding.status, finding.found, finding.consequence, finding.remedy, details=details)
    found = f"{finding.found}, {'a' if has_token else 'no'} token"
    if is_offline:
        consequence = "a model that is not on this machine is not fetched"
        found += ", HF_HUB_OFFLINE is set"
        return Finding(Status.WARNING, found, consequence, "unset HF_HUB_OFFLINE", details=details)
    if not bound.is_met:
        consequence, remedy = "downloads may fail: KunServe was not made for this version", bound.remedy
        return Finding(Status.WARNING, bound.text, consequence, remedy, details=details)
    return ok(found, **details)


def _check_folder(probe: Probe, folder: Path, consequence: str, remedy: str) -> Finding:
    """Whether files can be put into a folder, which need not exist yet."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
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


def _hub_home(probe: Probe) -> Path:
    if folder := probe.environment.get("HF_HOME"):
        return Path(folder).expanduser()
    cache = probe.environment.get("XDG_CACHE_HOME") or str(probe.home / ".cache")
    return Path(cache).expanduser() / "huggingface"


def _has_token(probe: Probe) -> bool:
    """Tell whether the Hub is told who asks. The token itself is read by nobody here."""
    path = Path(probe.environment.get("HF_TOKEN_PATH") or _hub_home(probe) / "token").expanduser()
    return bool(probe.environment.get("HF_TOKEN")) or path.exists()
