"""Checks of the host: CPU devices, memory, and the limits that the kernel sets to this process."""

from __future__ import annotations

import resource
from typing import Any

from kunserve.doctor.cards import Card, known_cards
from kunserve.doctor.finding import BOTH, CPU, Finding, Status, first_line, ok
from kunserve.doctor.gpus import GIB, Gpus
from kunserve.doctor.probe import Probe
from kunserve.host.cgroup import core_quota, memory_left

CHUNK_BYTES = 2 << 20  # of a CPU device
POPULATE_KERNEL, COLLAPSE_KERNEL = (5, 14), (6, 1)  # the first ones with these kinds of madvise
OWN_FILES = 100  # what a server has open besides its clients


def check_system(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether KunServe runs on this operating system at all."""
    found = f"{probe.version('kunserve')}, Python {probe.python}, {probe.system} {probe.kernel}"
    details = {"version": probe.version("kunserve"), "python": probe.python, "kernel": probe.kernel}
    if probe.system != "Linux":
        consequence = "no server starts: devices are made of Linux's memory mappings"
        return Finding(Status.PROBLEM, found, consequence, "use Linux, in a container if need be", BOTH, details)
    if probe.working_folder is None:
        found = "the working directory was removed, or may not be looked at"
        return Finding(Status.PROBLEM, found, "no server starts", "cd ~", BOTH, details)
    return ok(found, **details)


def check_cpu_devices(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether virtual CPU devices can be made, how many cores they may use, and which instructions."""
    cores = probe.cores()
    quota = core_quota(probe.read_text)
    usable = cores if quota is None else min(float(cores), quota)
    vectors, is_wide = _vectors(probe)
    found = f"{usable:g} core(s), {vectors}"
    details = {"cores": cores, "quota": quota, "vectors": vectors}
    kernel = _kernel_version(probe.kernel)
    try:
        probe.take_memory(CHUNK_BYTES)
    except Exception as error:
        reason = f"memory for a device cannot be taken: {first_line(error)}"
        remedy = "allow memfd_create (sysctl vm.memfd_noexec=0, the container's seccomp profile)"
        if kernel < POPULATE_KERNEL:
            remedy = "use Linux 5.14 or later"
        return Finding(Status.PROBLEM, reason, "--devices cpu fails", remedy, frozenset({CPU}), details)
    if usable < 2:
        consequence = "the default, two CPU devices, shares one core: slow"
        return Finding(Status.WARNING, found, consequence, "--devices cpu:1, or more cores", details=details)
    if not is_wide:
        consequence = "CPU kernels compute four numbers at once, not 8 or 16: slow"
        remedy = "in a virtual machine pass the host's CPU through"
        return Finding(Status.WARNING, found, consequence, remedy, details=details)
    if kernel < COLLAPSE_KERNEL:
        consequence = "CPU devices get pages of 4 KiB: longer remaps"
        return Finding(Status.WARNING, found, consequence, "use Linux 6.1 or later", details=details)
    return ok(found, **details)


def check_memory(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether weights of the known models fit in host memory: in CPU devices, or as the pinned copy for GPUs."""
    available = _available(probe)
    cards, _ = known_cards(probe)  # the check "models" names broken ones
    sizes = {card.name: card.pinned_bytes if gpus.found else card.float32_bytes for card in cards}
    fitting = [name for name, num_bytes in sizes.items() if num_bytes <= available]
    details = {"available_bytes": available, "weights_bytes": sizes, "fitting": fitting}
    found = f"{available / GIB:.1f} GiB available"
    smallest = min(cards, key=lambda card: card.float32_bytes, default=None)
    if smallest is not None and smallest.float32_bytes > available:
        need = f"{smallest.name} alone needs {smallest.float32_bytes / GIB:.1f} GiB"
        remedy = "end what holds memory, or raise the container's limit"
        found = f"{found}; {need}"
        consequence = "no known model fits on CPU devices"
        return Finding(Status.PROBLEM, found, consequence, remedy, frozenset({CPU}), details)
    if gpus.found:
        if unpinned := _only_on_gpus(cards, gpus, available):
            consequence = f"no pinned copy of {', '.join(unpinned)}: after a drop their weights come back slowly"
            remedy = "more host memory, or --host-copy none: weights then come from another GPU where one has them"
            return Finding(Status.WARNING, found, consequence, remedy, details=details)
        return ok(f"{found}; pinned weights that fit: {_some(fitting, sizes)}", **details)
    return ok(f"{found}; fits in float32: {_some(fitting, sizes)}", **details)


def check_locked_memory(probe: Probe, gpus: Gpus) -> Finding:
    """Say what the limit of locked memory is. CPU devices lock nothing.

    cuMemHostRegister does not count either: NVIDIA's kernel module takes pages with pin_user_pages and asks for no
    limit (os_lock_user_pages in os-mlock.c of NVIDIA/open-gpu-kernel-modules). RDMA would count, and is not used.
    """
    limit = probe.limit(resource.RLIMIT_MEMLOCK)
    return ok(f"{_size(limit)}; pinning weights does not count against it", limit_bytes=limit)


def check_mappings(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether the kernel lets a process have as many mappings as chunks of CPU devices, and all addresses."""
    limit = int(probe.read_text("/proc/sys/vm/max_map_count"))
    addresses = probe.limit(resource.RLIMIT_AS)
    reach, available = limit * CHUNK_BYTES, _available(probe)
    found = f"{limit:,}: enough for {reach / GIB:,.0f} GiB of CPU devices"
    details = {"max_map_count": limit, "address_space_bytes": addresses}
    if addresses is not None:
        found = f"address space is limited to {_size(addresses)}"
        consequence = "devices reserve more addresses than they have memory: a server may not start"
        return Finding(Status.WARNING, found, consequence, "ulimit -v unlimited", details=details)
    if not gpus.found and reach < available:
        consequence = f"a remap may fail on CPU devices of more than {reach / GIB:,.0f} GiB together"
        remedy = f"sysctl -w vm.max_map_count={2 * available // CHUNK_BYTES}"
        return Finding(Status.WARNING, found, consequence, remedy, details=details)
    return ok(found, **details)


def check_open_files(probe: Probe, gpus: Gpus) -> Finding:
    """Check whether all clients that may run and wait can be connected at once."""
    config: Any = probe.import_module("kunserve.config").EngineConfig(model="")
    limit, wanted = probe.limit(resource.RLIMIT_NOFILE), config.max_num_queued_reqs + config.max_num_seqs + OWN_FILES
    if limit is not None and limit < wanted:
        consequence = f"more than {max(0, limit - OWN_FILES):,} clients at once are not answered"
        remedy = "ulimit -n 65536"
        return Finding(Status.WARNING, f"{limit:,}", consequence, remedy, details={"limit": limit})
    return ok("unlimited" if limit is None else f"{limit:,}", limit=limit)


def _available(probe: Probe) -> int:
    """Return how much memory may be taken: what the machine has, or the control group leaves, if that is less."""
    available, left = probe.available_bytes(), memory_left(probe.read_text)
    return available if left is None else min(available, left)


def _only_on_gpus(cards: list[Card], gpus: Gpus, available: int) -> list[str]:
    """Return the models that fit on the GPUs together, but not in host memory."""
    total = sum(gpu.total_bytes for gpu in gpus.found)
    return [card.name for card in cards if available < card.pinned_bytes <= total]


def _some(names: list[str], sizes: dict[str, int]) -> str:
    return f"{len(names)} of {len(sizes)} cards" if len(names) > 2 else ", ".join(names) or "no card"


def _vectors(probe: Probe) -> tuple[str, bool]:
    """Return what the C kernels compute with, and whether that is more than four numbers at once (or NEON's)."""
    words = set(probe.read_text("/proc/cpuinfo").split())
    if "avx512f" in words:
        return "AVX-512", True
    if {"avx2", "fma"} <= words:
        return "AVX2", True
    if "asimd" in words:
        return "NEON", True
    return "neither AVX2 nor AVX-512", False


def _kernel_version(release: str) -> tuple[int, ...]:
    """Return (6, 1) of "6.1.0-13-amd64"."""
    major, minor = release.split(".")[:2]
    return int(major), int("".join(char for char in minor if char.isdigit()) or 0)


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "unlimited"
    return f"{num_bytes >> 10:,} KiB" if num_bytes < 1 << 20 else f"{num_bytes >> 20:,} MiB"
