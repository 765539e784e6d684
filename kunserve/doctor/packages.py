"""Checks of Python packages: versions against the bounds of KunServe's own metadata, and whether they can be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kunserve.doctor.finding import BOTH, CUDA, Finding, Status, first_line, ok
from kunserve.doctor.gpus import Gpus
from kunserve.doctor.probe import Probe


@dataclass(frozen=True, slots=True)
class Bound:
    """One requirement of KunServe's, and what is installed."""

    name: str
    wanted: str  # ">=2.11"
    installed: str | None
    is_met: bool

    @property
    def text(self) -> str:
        """Say what is there and what is wanted, in a few words."""
        return f"{self.name} {self.installed or 'is not installed'} (wanted {self.wanted or 'any'})"

    @property
    def remedy(self) -> str:
        """Give the command that installs what is wanted."""
        return f"pip install '{self.name}{self.wanted}'"


def bounds(probe: Probe, extra: str = "") -> Iterator[Bound]:
    """Yield what KunServe requires, or what one of its extras adds."""
    packaging = probe.import_module("packaging.requirements")  # may be missing, as any package may be
    for line in probe.requirements():
        requirement = packaging.Requirement(line)
        is_added = requirement.marker is not None and "extra" in str(requirement.marker)
        if is_added != bool(extra) or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        installed = probe.version(requirement.name)
        is_met = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        yield Bound(requirement.name, str(requirement.specifier), installed, is_met)


def check_packages(probe: Probe, gpus: Gpus) -> Finding:
    """Whether all that every server needs is installed, in versions that KunServe was made for, and can be imported."""
    needed = [bound for bound in bounds(probe) if bound.name != "torch"]  # which has a check of its own
    details = {bound.name: bound.installed for bound in needed}
    if absent := [bound for bound in needed if bound.installed is None]:
        names = ", ".join(bound.name for bound in absent)
        remedy = "pip install " + " ".join(f"'{bound.name}{bound.wanted}'" for bound in absent)
        return Finding(Status.MISSING, f"not installed: {names}", "no server starts", remedy, BOTH, details)
    try:
        probe.import_module("kunserve.server")
    except Exception as error:  # whatever a broken package raises
        reason = f"the server cannot be imported: {first_line(error)}"
        return Finding(Status.PROBLEM, reason, "no server starts", "install the named package anew", BOTH, details)
    if others := [bound for bound in needed if not bound.is_met]:
        consequence = "KunServe was not made for this version: anything may fail"
        text = ", ".join(bound.text for bound in others)
        remedy = "pip install " + " ".join(f"'{bound.name}{bound.wanted}'" for bound in others)
        return Finding(Status.WARNING, text, consequence, remedy, details=details)
    return ok(f"all {len(needed)} that a server needs, within KunServe's bounds", **details)


def check_torch(probe: Probe, gpus: Gpus) -> Finding:
    """Whether torch is there, within the bounds, and can use the GPUs if there are some."""
    bound = next(bound for bound in bounds(probe) if bound.name == "torch")
    if bound.installed is None:
        return Finding(Status.MISSING, "not installed", "no server starts", bound.remedy, BOTH)
    try:
        torch = probe.import_module("torch")
        is_available, complaint = _can_use_cuda(torch)
    except Exception as error:
        reason = f"{bound.installed} cannot be imported: {first_line(error)}"
        return Finding(Status.PROBLEM, reason, "no server starts", f"{bound.remedy} --force-reinstall", BOTH)
    version, cuda = str(torch.__version__), torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "CPU build"
    found, details = f"{version}, {build}", {"version": version, "cuda": cuda, "cuda_is_available": is_available}
    if gpus.found and not is_available:
        reason, remedy = _why_no_cuda(cuda, complaint, gpus)
        consequence = "--devices cuda fails, and a server takes CPU devices"
        return Finding(Status.PROBLEM, f"{found}: {reason}", consequence, remedy, frozenset({CUDA}), details)
    if not bound.is_met:
        consequence = "KunServe was not made for this version: anything may fail"
        return Finding(Status.WARNING, bound.text, consequence, bound.remedy, details=details)
    return ok(found + (", can use the GPUs" if is_available else ""), **details)


def check_structured(probe: Probe, gpus: Gpus) -> Finding:
    """Whether answers can be held to a grammar."""
    (bound,) = bounds(probe, "structured")
    consequence = "structured output is refused"
    remedy = "pip install 'kunserve[structured]'"
    if bound.installed is None:
        return Finding(Status.MISSING, f"{bound.name} is not installed", consequence, remedy)
    try:
        probe.import_module(bound.name)
    except Exception as error:
        return Finding(Status.PROBLEM, f"{bound.name} cannot be imported: {first_line(error)}", consequence, remedy)
    if not bound.is_met:
        consequence = "structured output may fail: KunServe was not made for this version"
        return Finding(Status.WARNING, bound.text, consequence, remedy)
    return ok(f"{bound.name} {bound.installed}", version=bound.installed)


def _can_use_cuda(torch: Any) -> tuple[bool, str]:
    """Ask torch, and keep what it says about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = bool(torch.cuda.is_available())
    return is_available, first_line(caught[0].message) if caught else ""


def _why_no_cuda(cuda: str | None, complaint: str, gpus: Gpus) -> tuple[str, str]:
    """Say why torch does not use the GPUs that the driver shows, and what mends it."""
    if cuda is None:
        return "it cannot use the GPU", "install a CUDA build of torch: https://pytorch.org/get-started/locally"
    major = int(cuda.partition(".")[0])
    if gpus.driver_cuda and gpus.driver_cuda[0] < major:
        newest = ".".join(map(str, gpus.driver_cuda))
        remedy = f"update the driver, or install a torch that is built for CUDA {gpus.driver_cuda[0]}"
        return f"the driver is too old, it ends at CUDA {newest}", remedy
    reason = complaint or "it cannot use the GPU and does not say why"
    return reason, "python -c 'import torch; torch.zeros(1).cuda()' says more"
