"""The GPUs as NVIDIA's driver shows them, and checks of them. Asks the driver, so that a wrong torch hides nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kunserve.doctor.finding import CUDA, Finding, Status, first_line, ok
from kunserve.doctor.probe import Probe

GIB = 1 << 30
BUSY_SHARE = 0.1  # of a GPU's memory: so much taken is more than a driver's own part
PCI, NVIDIA, DISPLAY = "/sys/bus/pci/devices", "0x10de", "0x03"
NOT_NEEDED = "not needed without a GPU"
GET_CUDA = "pip install 'kunserve[cuda]'"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `reaches`: the others whose memory its kernels and copies use directly."""

    ordinal: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    has_virtual_memory: bool
    reaches: frozenset[int]

    @property
    def is_slice(self) -> bool:
        """Tell whether this is a MIG slice: the driver says so in its name."""
        return " MIG " in self.name


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs of the machine; `fault` says why there is none."""

    found: tuple[Gpu, ...] = ()
    driver: str | None = None  # version of the kernel module
    driver_cuda: tuple[int, int] | None = None  # newest CUDA that the driver knows
    fault: Finding | None = field(default=None)


class DriverError(Exception):
    """A call into the driver failed; the message names call and error."""


def find_gpus(probe: Probe) -> Gpus:
    """Ask the driver for all GPUs that this process may use."""
    driver = _kernel_module(probe)
    try:
        bindings = probe.import_module("cuda.bindings.driver")
    except Exception as error:
        return Gpus(driver=driver, fault=_no_bindings(probe, driver, error))
    try:
        status = bindings.cuInit(0)[0]
    except Exception as error:  # cuda-pathfinder finds no libcuda
        return Gpus(driver=driver, fault=_no_driver(probe, driver, first_line(error)))
    try:
        version = _call(bindings, "cuDriverGetVersion")
        cuda = (version // 1000, version % 1000 // 10)
        if status.value:
            return Gpus((), driver, cuda, _not_started(probe, driver, status.name))
        count = _call(bindings, "cuDeviceGetCount")
        if count == 0:
            return Gpus((), driver, cuda, _not_started(probe, driver, "CUDA_ERROR_NO_DEVICE"))
        devices = [_call(bindings, "cuDeviceGet", i) for i in range(count)]
        return Gpus(tuple(_gpu(bindings, devices, i) for i in range(count)), driver, cuda)
    except DriverError as error:
        consequence, remedy = "--devices cuda fails", "nvidia-smi shows the GPUs' state; restart what is broken"
        return Gpus((), driver, None, Finding(Status.PROBLEM, str(error), consequence, remedy, frozenset({CUDA})))


def check_gpus(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether there are GPUs, what they are, and how much of their memory is free."""
    if gpus.fault is not None:
        return gpus.fault
    details = {
        "driver": gpus.driver,
        "driver_cuda": _dotted(gpus.driver_cuda),
        "gpus": [_described(gpu) for gpu in gpus.found],
    }
    found = f"driver {gpus.driver or 'of unknown version'} (CUDA {_dotted(gpus.driver_cuda)}); {_listed(gpus.found)}"
    if old := [gpu.ordinal for gpu in gpus.found if not gpu.has_virtual_memory]:
        reason = f"{found}; without virtual memory management: {_names(old)}"
        others = [gpu.ordinal for gpu in gpus.found if gpu.has_virtual_memory]
        remedy = f"--devices {_names(others) if others else 'cpu:2'}, or a GPU of the Pascal generation or later"
        prevents = frozenset[str]() if others else frozenset({CUDA})
        return Finding(Status.PROBLEM, reason, "--devices cuda fails", remedy, prevents, details)
    if busy := [gpu for gpu in gpus.found if gpu.free_bytes < (1 - BUSY_SHARE) * gpu.total_bytes]:
        taken = max(gpu.total_bytes - gpu.free_bytes for gpu in busy)
        consequence = f"others hold up to {taken / GIB:.1f} GiB of {_names([gpu.ordinal for gpu in busy])}: less KV"
        remedy = "end what holds it (nvidia-smi names it), or choose GPUs with --devices"
        return Finding(Status.WARNING, found, consequence, remedy, details=details)
    return ok(found, **details)


def check_peer_access(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether GPUs reach each other's memory."""
    if len(gpus.found) < 2:
        return ok("not needed with one GPU" if gpus.found else NOT_NEEDED)
    matrix = {gpu.ordinal: sorted(gpu.reaches) for gpu in gpus.found}
    islands = _islands(gpus.found)
    if len(islands) == 1:
        return ok(f"all {len(gpus.found)} GPUs reach each other", matrix=matrix)
    found = f"{len(islands)} islands: " + "; ".join(_names(island) for island in islands)
    consequence = "between islands KV is exchanged, and chains send activations, through host memory: slower"
    remedy = f"--devices {_names(max(islands, key=len))}, or lift what forbids it (nvidia-smi topo -p2p r)"
    return Finding(Status.WARNING, found, consequence, remedy, details={"matrix": matrix, "islands": islands})


def _islands(gpus: Sequence[Gpu]) -> list[list[int]]:
    """Return GPUs by the first one that they reach, as `kunserve.gpu.cuda.device.islands` does for the planner."""
    first = {gpu.ordinal: min({gpu.ordinal, *gpu.reaches}) for gpu in gpus}
    return [[ordinal for ordinal in first if first[ordinal] == island] for island in dict.fromkeys(first.values())]


def _gpu(bindings: Any, devices: Sequence[Any], ordinal: int) -> Gpu:
    device, attributes = devices[ordinal], bindings.CUdevice_attribute
    name = bytes(_call(bindings, "cuDeviceGetName", 256, device)).partition(b"\0")[0].decode(errors="replace")
    major, minor, has_virtual_memory = (
        int(_call(bindings, "cuDeviceGetAttribute", attribute, device))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        )
    )
    others = [i for i in range(len(devices)) if i != ordinal]
    reaches = frozenset(i for i in others if _call(bindings, "cuDeviceCanAccessPeer", device, devices[i]))
    free_bytes, total_bytes = _memory(bindings, device)
    return Gpu(ordinal, name, total_bytes, free_bytes, (major, minor), bool(has_virtual_memory), reaches)


def _memory(bindings: Any, device: Any) -> tuple[int, int]:
    """Return free and total memory; only a context is told, so that this also shows that one can be made."""
    context = _call(bindings, "cuDevicePrimaryCtxRetain", device)
    try:
        _call(bindings, "cuCtxPushCurrent", context)
        try:
            free_bytes, total_bytes = _call(bindings, "cuMemGetInfo")
        finally:
            _call(bindings, "cuCtxPopCurrent")
        return int(free_bytes), int(total_bytes)
    finally:
        _call(bindings, "cuDevicePrimaryCtxRelease", device)


def _call(bindings: Any, name: str, *arguments: Any) -> Any:
    """Return what a call of the driver returns after its status. DriverError if that says so."""
    status, *values = getattr(bindings, name)(*arguments)
    if status.value:
        raise DriverError(f"{name} failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _no_bindings(probe: Probe, driver: str | None, error: Exception) -> Finding:
    """Say what is missing where nobody can be asked for GPUs."""
    if driver is None:
        return _no_driver(probe, driver, "cuda-bindings, which would find it, is not installed either")
    found = f"driver {driver}, but cuda-bindings cannot be imported: {first_line(error)}"
    return Finding(Status.MISSING, found, "--devices cuda fails", GET_CUDA, frozenset({CUDA}), {"driver": driver})


def _no_driver(probe: Probe, driver: str | None, reason: str) -> Finding:
    """Tell apart: a container without the driver's library, a GPU without a driver, no GPU."""
    prevents, num_cards = frozenset({CUDA}), _num_cards(probe)
    details = {"driver": driver, "pci_gpus": num_cards, "reason": reason}
    if driver is not None:
        found, remedy = f"driver {driver}, but no libcuda.so.1", "in a container: docker run --gpus all"
        return Finding(Status.PROBLEM, found, "--devices cuda fails", remedy, prevents, details)
    if num_cards:
        found = f"{num_cards} NVIDIA GPU(s) on the PCI bus, but no NVIDIA driver"
        remedy = "install NVIDIA's driver (Debian, Ubuntu: nvidia-driver); until then --devices cpu:2"
        return Finding(Status.PROBLEM, found, "--devices cuda fails", remedy, prevents, details)
    consequence, remedy = "only CPU devices, for small models", "--devices cpu:N"
    return Finding(Status.MISSING, "no NVIDIA GPU and no NVIDIA driver", consequence, remedy, prevents, details)


def _not_started(probe: Probe, driver: str | None, error: str) -> Finding:
    """Say why the driver, which is there, shows no GPU."""
    found, details = f"driver {driver or 'of unknown version'} does not start: {error}", {"driver": driver}
    remedy = "nvidia-smi says more; after an update of the driver, restart the machine"
    if error == "CUDA_ERROR_NO_DEVICE":
        found, remedy = f"driver {driver or 'of unknown version'}, but no GPU", "in a container: docker run --gpus all"
        if "CUDA_VISIBLE_DEVICES" in probe.environment:
            value = probe.environment["CUDA_VISIBLE_DEVICES"]
            found, remedy = f"{found}: CUDA_VISIBLE_DEVICES={value}", "unset CUDA_VISIBLE_DEVICES"
    return Finding(Status.PROBLEM, found, "--devices cuda fails", remedy, frozenset({CUDA}), details)


def _kernel_module(probe: Probe) -> str | None:
    """Return the version of NVIDIA's kernel module, if it is loaded."""
    try:
        text = probe.read_text("/proc/driver/nvidia/version")
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def _num_cards(probe: Probe) -> int:
    """Count NVIDIA's GPUs on the PCI bus."""
    try:
        names = probe.list_folder(PCI)
        cards = [(probe.read_text(f"{PCI}/{name}/vendor"), probe.read_text(f"{PCI}/{name}/class")) for name in names]
    except OSError:
        return 0
    return sum(vendor.strip() == NVIDIA and kind.startswith(DISPLAY) for vendor, kind in cards)


def _listed(gpus: Sequence[Gpu]) -> str:
    """Say how many there are of each kind, and their memory."""
    kinds = Counter((gpu.name, gpu.capability, gpu.total_bytes) for gpu in gpus)
    texts = []
    for (name, capability, total_bytes), count in kinds.items():
        free = min(gpu.free_bytes for gpu in gpus if (gpu.name, gpu.total_bytes) == (name, total_bytes))
        memory = f"{free / GIB:.1f} of {total_bytes / GIB:.1f} GiB free"
        texts.append(f"{count} x {name} ({_dotted(capability)}), {memory}")
    return "; ".join(texts)


def _described(gpu: Gpu) -> dict[str, Any]:
    return {
        "ordinal": gpu.ordinal,
        "name": gpu.name,
        "total_bytes": gpu.total_bytes,
        "free_bytes": gpu.free_bytes,
        "compute_capability": _dotted(gpu.capability),
        "is_mig_slice": gpu.is_slice,
    }


def _names(ordinals: Sequence[int]) -> str:
    """Write GPUs as `--devices` takes them."""
    return f"cuda:{','.join(map(str, ordinals))}"


def _dotted(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version)) if version else "?"
