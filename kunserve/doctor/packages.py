"""Checks of Python packages: versions against the bounds of KunServe's own metadata, and whether they can be used."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kunserve.doctor.finding import BOTH, CUDA, Finding, Status, first_line, ok
from kunserve.doctor.gpus import Gpus
from kunserve.doctor.probe import Probe

OWN_CHECKS = ("torch", "huggingface-hub", "llguidance")  # these packages have a check of their own
# What `kunserve serve` imports when it knows what to serve, the last when it loads.
SERVER_MODULES = ("kunserve.command.serving", "uvloop", "kunserve.engine.launch.launch")
# Packages that a server imports late or never: what they are imported as, and what fails without them.
LATE: Mapping[str, tuple[str, str]] = {
    "gguf": ("gguf.quants", "smollm2-135m cannot be prepared"),
    "pyyaml": ("yaml", "serve --config FILE fails"),
    "pip": ("pip", "smollm2-135m cannot be fetched"),
}


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


def bound_of(probe: Probe, name: str, extra: str = "") -> Bound:
    """Return one requirement of KunServe's, or of one of its extras."""
    return next(bound for bound in bounds(probe, extra) if bound.name == name)


def check_packages(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether what every server needs is installed, in versions that were tried, and can be imported."""
    required = list(bounds(probe))
    needed = [bound for bound in required if bound.name not in OWN_CHECKS]
    details = {bound.name: bound.installed for bound in needed}
    if absent := [bound for bound in needed if bound.installed is None]:
        found = f"not installed: {', '.join(bound.name for bound in absent)}"
        if all(bound.name in LATE for bound in absent):
            consequence = "; ".join(LATE[bound.name][1] for bound in absent)
            return Finding(Status.MISSING, found, consequence, _install(absent), details=details)
        return Finding(Status.MISSING, found, "no server starts", _install(absent), BOTH, details)
    try:
        for module in SERVER_MODULES:
            probe.import_module(module)
    except Exception as error:  # whatever a broken package raises
        culprit = _culprit(error, required)
        found = f"the server cannot be imported: {f'in {culprit.name}: ' if culprit else ''}{first_line(error)}"
        remedy = f"{culprit.remedy} --force-reinstall" if culprit else "install anew what the message names"
        return Finding(Status.PROBLEM, found, "no server starts", remedy, BOTH, details)
    for bound in (bound for bound in needed if bound.name in LATE):
        module, consequence = LATE[bound.name]
        if finding := _import_fault(probe, bound, module, consequence):
            return finding
    if others := [bound for bound in needed if not bound.is_met]:
        consequence = "KunServe was not made for this version: anything may fail"
        text = ", ".join(bound.text for bound in others)
        return Finding(Status.WARNING, text, consequence, _install(others), details=details)
    return ok(f"all {len(needed)} that a server needs, within KunServe's bounds", **details)


def check_torch(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether torch is there, within the bounds, and can use the GPUs if there are some."""
    bound = bound_of(probe, "torch")
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
    """Check whether answers can be held to a grammar."""
    bound = bound_of(probe, "llguidance")
    if finding := check_late_package(probe, bound, "llguidance", "structured output fails"):
        return finding
    if not bound.is_met:
        consequence = "structured output may fail: KunServe was not made for this version"
        return Finding(Status.WARNING, bound.text, consequence, bound.remedy)
    return ok(f"{bound.name} {bound.installed}", version=bound.installed)


def check_late_package(probe: Probe, bound: Bound, module: str, consequence: str) -> Finding | None:
    """Return what is wrong with a package that servers start without; None if `module`, which needs it, imports."""
    if bound.installed is None:
        return Finding(Status.MISSING, f"{bound.name} is not installed", consequence, bound.remedy)
    return _import_fault(probe, bound, module, consequence)


def _import_fault(probe: Probe, bound: Bound, module: str, consequence: str) -> Finding | None:
    try:
        probe.import_module(module)
    except Exception as error:  # whatever a broken package raises
        found = f"{bound.name} cannot be imported: {first_line(error)}"
        return Finding(Status.PROBLEM, found, consequence, f"{bound.remedy} --force-reinstall")
    return None


def _install(wanted: Sequence[Bound]) -> str:
    """Give the command that installs several packages."""
    return "pip install " + " ".join(f"'{bound.name}{bound.wanted}'" for bound in wanted)


def _culprit(error: Exception, required: Sequence[Bound]) -> Bound | None:
    """Return the required package in whose code an import failed: the error's own text need not name it."""
    modules = {bound.name.replace("-", "_"): bound for bound in required}
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((bound for name in reversed(frames) if (bound := modules.get(name.partition(".")[0]))), None)


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
