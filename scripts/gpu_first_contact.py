"""First contact with a GPU: each call that KunServe stands on, by itself. `gpu_first_contact.py [--ordinal N]`

Prints a line of JSON as each step ends: {"step", "ok", "seconds"} and its figures, or "error". A step that fails, hangs
or takes its process with it is reported, and the rest goes on in a new one: half a minute tells everything. Needs torch
and cuda-bindings; FlashInfer and KunServe only for their own steps. See dev/gpu/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[int], dict[str, Any]]  # of a GPU's ordinal
MIB = 1 << 20
CHUNK = 48 * MIB
PACKAGES = (
    "triton", "flashinfer-python", "apache-tvm-ffi", "cuda-bindings", "structlog", "tokenizers", "numpy", "orjson",
    "aiohttp", "uvloop",
)  # fmt: skip


class Vmm:
    """CUDA's virtual memory calls on one GPU, in torch's context. RuntimeError with CUDA's name for what it refuses."""

    def __init__(self, ordinal: int) -> None:
        from cuda.bindings import driver

        torch.zeros(1, device=f"cuda:{ordinal}")
        self.cuda, self.device = driver, torch.device("cuda", ordinal)
        self.call("cuInit", 0)
        context = self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", ordinal))
        self.call("cuCtxSetCurrent", context)
        self.properties = driver.CUmemAllocationProp()
        self.properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.properties.location.id = ordinal
        self.access = driver.CUmemAccessDesc()
        self.access.location = self.properties.location
        self.access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.cuda, name)(*arguments)
        if int(status):
            raise RuntimeError(f"{name}: {status.name}")
        return values[0] if len(values) == 1 else values

    def create(self, num_bytes: int = CHUNK) -> Any:
        return self.call("cuMemCreate", num_bytes, self.properties, 0)

    def reserve(self, num_bytes: int) -> int:
        return int(self.call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def map(self, address: int, handles: Sequence[Any], num_bytes: int = CHUNK) -> None:
        """Map handles side by side, and give access to all in one call."""
        for i, handle in enumerate(handles):
            self.call("cuMemMap", address + i * num_bytes, num_bytes, 0, handle, 0)
        self.call("cuMemSetAccess", address, len(handles) * num_bytes, [self.access], 1)

    def unmap(self, address: int, num_bytes: int = CHUNK) -> None:
        self.call("cuMemUnmap", address, num_bytes)

    def unmap_each(self, address: int, count: int, num_bytes: int) -> None:
        """Unmap neighbours in a call for each."""
        for i in range(count):
            self.unmap(address + i * num_bytes, num_bytes)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """Make a flat uint8 tensor over addresses, as KunServe does."""
        storage = torch._C._construct_storage_from_data_pointer(address, self.device, num_bytes)
        flat = torch.empty(0, dtype=torch.uint8, device=self.device)
        return flat.set_(storage, 0, (num_bytes,), (1,))

    def stream(self) -> Any:
        handle = int(self.call("cuStreamCreate", 1))
        return torch.cuda.ExternalStream(handle, device=self.device)  # type: ignore[no-untyped-call]


def microseconds(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Return the microseconds of one of `repeats` things that `work` does, and what it returns."""
    begun = time.perf_counter()
    result = work()
    return round((time.perf_counter() - begun) / repeats * 1e6, 1), result


# --- what there is --------------------------------------------------------------------------------------------------


def versions(ordinal: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["dlpack_exchange_api"] = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    properties = torch.cuda.get_device_properties(ordinal)
    found |= {"gpu": properties.name, "memory_gib": properties.total_memory >> 30, "cores": os.cpu_count()}
    return found | {"capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count}


# --- virtual memory -------------------------------------------------------------------------------------------------


def calls(ordinal: int) -> dict[str, Any]:
    """Time each call of the driver by chunk size, in microseconds."""
    vmm, count, figures = Vmm(ordinal), 16, dict[str, Any]()
    minimum = vmm.cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    figures["granularity"] = vmm.call("cuMemGetAllocationGranularity", vmm.properties, minimum)
    for size in (2 * MIB, CHUNK, 64 * MIB):
        create, handles = microseconds(lambda size=size: [vmm.create(size) for _ in range(count)], count)  # type: ignore[misc]
        base = vmm.reserve(count * size)
        mapped, _ = microseconds(lambda size=size, base=base, handles=handles: vmm.map(base, handles, size))  # type: ignore[misc]
        first, _ = microseconds(lambda size=size, base=base: vmm.unmap(base, size))  # type: ignore[misc]
        each, _ = microseconds(lambda size=size, base=base: vmm.unmap_each(base + size, count - 1, size), count - 1)  # type: ignore[misc]
        vmm.call("cuMemAddressFree", base, count * size)
        release, _ = microseconds(lambda handles=handles: [vmm.call("cuMemRelease", h) for h in handles], count)  # type: ignore[misc]
        figures[f"{size // MIB} MiB, us"] = {
            "create": create, "map 16 with access": mapped, "unmap first": first, "unmap": each, "release": release,
        }  # fmt: skip
    return figures


def unmap_runs(ordinal: int) -> dict[str, Any]:
    """Unmap a tail of whole mappings in one call, as a range shrinks; where that fails, KunServe unmaps one by one."""
    vmm, count = Vmm(ordinal), 16
    handles, base = [vmm.create() for _ in range(count)], vmm.reserve(count * CHUNK)
    vmm.map(base, handles)
    us, _ = microseconds(lambda: vmm.unmap(base + 4 * CHUNK, 12 * CHUNK))
    vmm.map(base + 4 * CHUNK, handles[:3:-1])
    return {"us_for_12": us}


def reserve_much(ordinal: int) -> dict[str, Any]:
    """Time reserving the addresses of eight devices with 40 layers of 72 GiB each."""
    vmm = Vmm(ordinal)
    us, _ = microseconds(lambda: [vmm.reserve(72 << 30) for _ in range(320)], 320)
    return {"us_each": us}


def tensors_over_mappings(ordinal: int) -> dict[str, Any]:
    """Check that a copy crosses the border of two chunks, and that content follows its chunk to another address."""
    vmm = Vmm(ordinal)
    handles, base = [vmm.create() for _ in range(2)], vmm.reserve(4 * CHUNK)
    vmm.map(base, handles)
    flat = vmm.tensor(base, 4 * CHUNK)
    flat[: 2 * CHUNK].view(torch.bfloat16).fill_(3.0)
    host = torch.full((CHUNK,), 7, dtype=torch.uint8).pin_memory()
    flat[CHUNK // 2 : CHUNK // 2 + CHUNK].copy_(host, non_blocking=True)
    torch.cuda.synchronize(ordinal)
    assert int(flat[CHUNK]) == 7 and int(flat[CHUNK // 2 - 1]) != 7, "a copy over a border went wrong"
    vmm.unmap(base, 2 * CHUNK)
    vmm.map(base, handles[1:])
    assert int(flat[0]) == 7, "content does not follow its chunk"
    return {}


def graph_after_remap(ordinal: int) -> dict[str, Any]:
    """Check that a graph reads what is mapped when it is replayed, not what was when it was captured."""
    vmm = Vmm(ordinal)
    handles, base = [vmm.create() for _ in range(2)], vmm.reserve(CHUNK)
    weight = vmm.tensor(base, CHUNK).view(torch.bfloat16)[: 4096 * 4096].view(4096, 4096)
    vmm.map(base, handles[:1])
    weight.fill_(1.0)
    x = torch.ones(8, 4096, device=vmm.device, dtype=torch.bfloat16)
    y, stream, graph = torch.empty_like(x), vmm.stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(ordinal)
    with torch.cuda.stream(stream):
        y.copy_(x @ weight)
        graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        y.copy_(x @ weight)
        graph.capture_end()
        stream.synchronize()
    vmm.unmap(base)
    vmm.map(base, handles[1:])
    weight.fill_(2.0)
    torch.cuda.synchronize(ordinal)
    with torch.cuda.stream(stream):
        us, _ = microseconds(graph.replay)
        stream.synchronize()
    assert float(y[0, 0]) == 8192.0, f"{float(y[0, 0])} instead of 8192"
    return {"replay_us": us}


def remap_beside_work(ordinal: int) -> dict[str, Any]:
    """Move a chunk while another stream computes elsewhere: its results must be right; tell whether it was held up."""
    vmm = Vmm(ordinal)
    handle, base = vmm.create(), vmm.reserve(CHUNK)
    x, stream = torch.zeros(1 << 28, device=vmm.device, dtype=torch.uint8), vmm.stream()
    torch.cuda.synchronize(ordinal)

    def move() -> None:
        for _ in range(50):
            vmm.map(base, [handle])
            vmm.unmap(base)

    with torch.cuda.stream(stream):
        for _ in range(300):
            x.add_(1)
    us, _ = microseconds(move, 50)
    is_busy = not stream.query()
    stream.synchronize()
    assert int(x[0]) == 300 % 256, "what was computed meanwhile is wrong"
    return {"move_us": us, "still_busy_after": is_busy}


# --- the host, launches ---------------------------------------------------------------------------------------------


def pin(ordinal: int) -> dict[str, Any]:
    """Time pinning a GiB that was not touched and one that was, and copying from there, in gigabytes a second."""
    vmm, size = Vmm(ordinal), 2 << 30
    host, device = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=vmm.device)
    register = ("cuMemHostRegister", host.data_ptr(), size, vmm.cuda.CU_MEMHOSTREGISTER_PORTABLE)

    def copy() -> None:
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize(ordinal)

    cold, _ = microseconds(lambda: vmm.call(*register))
    copy()
    copied, _ = microseconds(copy)
    vmm.call("cuMemHostUnregister", host.data_ptr())
    touched, _ = microseconds(lambda: vmm.call(*register))
    return {"untouched_s_per_gib": cold / 2e6, "touched_s_per_gib": touched / 2e6, "gb_per_s": size / copied / 1e3}


def launches(ordinal: int) -> dict[str, Any]:
    """Time what the host does in a step, in microseconds."""
    device = torch.device("cuda", ordinal)
    x = torch.zeros(64, 4096, device=device, dtype=torch.bfloat16)
    w = torch.zeros(4096, 4096, device=device, dtype=torch.bfloat16)
    host = torch.zeros(8192, dtype=torch.int32, pin_memory=True)
    ids = torch.zeros(8192, dtype=torch.int32, device=device)
    works: dict[str, Callable[[], Any]] = {
        "addmm_us": lambda: torch.addmm(x, x, w),
        "step_arrays_us": lambda: ids.copy_(host, non_blocking=True),
        "event_us": lambda: torch.cuda.Event(blocking=True).record(),  # type: ignore[no-untyped-call]
    }
    figures = {}
    for name, work in works.items():
        work()
        torch.cuda.synchronize(ordinal)
        figures[name], _ = microseconds(lambda work=work: [work() for _ in range(200)], 200)  # type: ignore[misc]
        torch.cuda.synchronize(ordinal)
    return figures


def pinned_after_stream(ordinal: int) -> dict[str, Any]:
    """Check that a pinned buffer may be freed when its stream is nobody's: KunServe never destroys one."""
    vmm = Vmm(ordinal)
    with torch.cuda.stream(vmm.stream()):
        host, there = torch.zeros(1024, pin_memory=True), torch.zeros(1024, device=vmm.device)
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize(ordinal)
    del host
    torch.empty(1024, pin_memory=True)
    return {}


def pinned_freed_during_capture(ordinal: int) -> dict[str, Any]:
    """Tell whether torch's host allocator goes on when a buffer of a stream that is captured is freed."""
    from gpucheck import contact

    return contact.free_during_capture(ordinal)


# --- FlashInfer -----------------------------------------------------------------------------------------------------


def flashinfer_decode(ordinal: int) -> dict[str, Any]:
    """Compare a planned decode step with torch, for two shapes of heads: error, plan, run, bytes a second."""
    return {
        f"{num_heads}/{num_kv_heads}x{head_dim}": _decode_step(ordinal, num_heads, num_kv_heads, head_dim)
        for num_heads, num_kv_heads, head_dim in ((32, 8, 128), (9, 3, 64))
    }


def _decode_step(ordinal: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    import flashinfer
    import flashinfer.decode

    device, batch, block, width = torch.device("cuda", ordinal), 64, 16, 65
    half = {"device": device, "dtype": torch.bfloat16}
    kv = torch.randn(batch * width, 2, num_kv_heads, block, head_dim, **half)  # type: ignore[call-overload]
    q = torch.randn(batch, num_heads, head_dim, **half)  # type: ignore[call-overload]
    indptr = torch.arange(0, batch * width + 1, width, dtype=torch.int32).pin_memory()
    last = torch.ones(batch, dtype=torch.int32).pin_memory()
    indices = torch.randperm(batch * width, device=device).int()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(128 * MIB, dtype=torch.uint8, device=device), "HND", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr.to(device), paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last.to(device), backend="fa2",
    )  # fmt: skip
    shape = num_heads, num_kv_heads, head_dim, block
    dtypes = dict.fromkeys(("q_data_type", "kv_data_type"), torch.bfloat16)
    wrapper.plan(indptr, indices, last, *shape, **dtypes)
    found, row = wrapper.run(q, kv), 5
    pages = kv[indices[row * width : (row + 1) * width].long()].float()
    k, v = (pages[:, i].movedim(1, 0).flatten(1, 2)[:, : (width - 1) * block + 1] for i in (0, 1))
    scores = torch.einsum("kgd,ksd->kgs", q[row].float().view(num_kv_heads, -1, head_dim), k) * head_dim**-0.5
    expected = torch.einsum("kgs,ksd->kgd", scores.softmax(-1), v).reshape(num_heads, head_dim)
    error = float((found[row].float() - expected).norm() / expected.norm())
    assert error < 1e-2, f"relative error {error}"

    def plan() -> None:
        for _ in range(100):
            flashinfer.decode.fast_decode_plan(
                wrapper, indptr, indices, last, *shape, **dtypes, global_override_indptr_cpu=indptr
            )

    def run() -> None:
        for _ in range(100):
            wrapper.run(q, kv)
        torch.cuda.synchronize(ordinal)

    plan_us, _ = microseconds(plan, 100)
    torch.cuda.synchronize(ordinal)
    run_us, _ = microseconds(run, 100)
    return {"error": error, "plan_us": plan_us, "run_us": run_us, "gb_per_s": kv.numel() * 2 / run_us / 1e3}


def packed_weights(ordinal: int) -> dict[str, Any]:
    """Check torch's product of 8-bit floats, and KunServe's kernel for 4 and 8 bits: right, and in a graph the same."""
    from gpucheck import contact

    return {"fp8": contact.fp8_product(ordinal), "ours": contact.packed_products(ordinal)}


STEPS: dict[str, Step] = {  # what may end the process comes last
    step.__name__: step
    for step in (
        versions, calls, unmap_runs, reserve_much, tensors_over_mappings, graph_after_remap, pin, launches,
        flashinfer_decode, packed_weights, pinned_after_stream, remap_beside_work,
        pinned_freed_during_capture,
    )
}  # fmt: skip


# --- running them ---------------------------------------------------------------------------------------------------


def serve(steps: Mapping[str, Step], names: Sequence[str], ordinal: int) -> None:
    """Run steps, in a process that may end at any of them; after one that has failed it does."""
    for name in names:
        print(json.dumps({"begins": name}), flush=True)
        begun = time.perf_counter()
        result: dict[str, Any] = {"step": name}
        try:
            result |= {"ok": True, **steps[name](ordinal)}
        except BaseException as error:
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            result |= {"ok": False, "error": f"{type(error).__name__}: {first}"}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - begun, 2)}, default=str), flush=True)
        if not result["ok"]:
            break  # a fault makes all fail that comes after it in the same process
    os._exit(0)


def follow(names: Sequence[str], command: Sequence[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """Run steps with `command` and their names, as often as it takes; no process for longer than `limit_s`."""
    left = list(names)
    while left:
        running = None
        with subprocess.Popen([*command, ",".join(left)], stdout=subprocess.PIPE, text=True) as process:
            killer = threading.Timer(limit_s, process.kill)
            killer.start()
            for line in process.stdout or ():
                told = json.loads(line)
                if "begins" in told:
                    running = told["begins"]
                    left.remove(running)
                else:
                    running = None
                    yield told
            status = process.wait()
            killer.cancel()
        if running is not None:
            yield {"step": running, "ok": False, "error": f"its process ended with status {status}"}
        elif status:
            yield {"step": left.pop(0), "ok": False, "error": f"its process did not begin: status {status}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ordinal", type=int, default=0, help="which GPU")
    parser.add_argument("--limit", type=float, default=90.0, metavar="S", help="end a process after so many seconds")
    parser.add_argument("--steps", help=argparse.SUPPRESS)  # in the process that runs them
    args = parser.parse_args()
    if args.steps:
        serve(STEPS, args.steps.split(","), args.ordinal)
    command = [sys.executable, __file__, "--ordinal", str(args.ordinal), "--steps"]
    results = []
    for result in follow(list(STEPS), command, args.limit):
        print(json.dumps(result), flush=True)
        results.append(result)
    num_ok = sum(result["ok"] for result in results)
    print(json.dumps({"ok": num_ok, "of": len(results)}))
    sys.exit(0 if num_ok == len(results) else 1)


if __name__ == "__main__":
    main()
