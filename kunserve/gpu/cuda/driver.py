"""The calls into CUDA's driver that a CUDA device is made of; below this there is only cuda-bindings and torch.

cuda-bindings is imported when a driver is opened, so that everything imports on machines that have no GPU. Every
failure is a `DeviceError` that names the GPU, the call and the CUDA_ERROR; what keeps a server from starting is a
`ConfigError`. `tests/fakes/gpus/fake_cuda.py` keeps the same rules without a GPU.
"""

from __future__ import annotations

import importlib
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from kunserve.errors import ConfigError, DeviceError

Stream = int  # a CUstream
Event = Any  # a torch.cuda.Event; the fake has its own

# Of this process, by GPU: streams that no device has. Contexts are torch's, so that they live as long as the process.
idle_streams: defaultdict[int, list[Stream]] = defaultdict(list)
_idle_streams_change = threading.Lock()


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Launch it on the current stream."""


class Driver(Protocol):
    """One GPU as its driver shows it. Addresses, handles and streams are integers; sizes are in bytes."""

    ordinal: int
    gpu_name: str  # as its maker calls it
    num_multiprocessors: int
    torch_device: torch.device
    granularity: int  # sizes and addresses of mappings are multiples of it

    def memory(self) -> tuple[int, int]:
        """Return the free and the total memory of the GPU, now."""

    def can_access(self, ordinal: int) -> bool:
        """Tell whether kernels and copies of this GPU reach another one's memory; its own always."""

    def create(self, num_bytes: int) -> int:
        """Take physical memory; returns its handle."""

    def release(self, handle: int) -> None:
        """Give physical memory back; it is mapped nowhere."""

    def reserve(self, num_bytes: int) -> int:
        """Reserve addresses."""

    def free(self, address: int, num_bytes: int) -> None:
        """Give reserved addresses back; nothing is mapped in them."""

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Map the whole of a handle. Not usable before `set_access`."""

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let the GPU read and write a range of mappings; one call for any number of them."""

    def unmap(self, address: int, num_bytes: int) -> None:
        """Unmap a range of whole mappings; one call for any number of them."""

    def take_stream(self) -> Stream:
        """Return a stream nobody else has, which does not wait for the default one. Another device may have had it."""

    def return_stream(self, stream: Stream) -> None:
        """Let others take a stream, which is idle. It is never destroyed.

        Whenever torch gets a pinned buffer back, it records events on all streams that have copied it.
        """

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Let torch launch on `stream` from this thread inside."""

    def current_stream(self) -> Stream:
        """Return the stream of this GPU that torch launches on from this thread."""

    def record(self, stream: Stream, *, is_timed: bool = False) -> Event:
        """Return an event that is reached when all work launched so far has finished. `is_timed`: for `seconds`."""

    def seconds(self, first: Event, last: Event) -> float:
        """Return the time from one event to another on the GPU's clock. Both are timed, and have been reached."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let work launched on `stream` from now on wait for `event`, which may be another GPU's. Does not block."""

    def synchronize(self, stream: Stream) -> None:
        """Block this thread, not the interpreter, until the stream is idle."""

    def synchronize_event(self, event: Event) -> None:
        """Block this thread, not the interpreter, until the event is reached."""

    def synchronize_all(self) -> None:
        """Block this thread until all streams of the GPU are idle, the default one too."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` launches on the current stream, and run nothing of it. Only before serving.

        While a stream is captured, nobody may free pinned memory that it has copied: torch would record an event in the
        capture, and whoever looks at that later fails.
        """

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """View addresses, mapped or not, as a flat uint8 tensor, which owns nothing."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Lock host memory in place, for copies by every GPU."""

    def unpin(self, address: int) -> None:
        """Undo `pin`."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Return a new pinned host buffer, uint8. Costs an allocation, and its end events: make few, and keep them."""

    def close(self) -> None:
        """Leave the GPU; everything made here has been given back."""


def load_bindings() -> Any:
    """Return cuda.bindings.driver, initialised. ConfigError, in a line, if this machine cannot use a GPU."""
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        raise ConfigError("--devices cuda needs cuda-bindings: pip install 'kunserve[cuda]'") from None
    try:
        (result,) = bindings.cuInit(0)
    except RuntimeError:  # cuda-pathfinder finds no libcuda
        raise ConfigError("--devices cuda: this machine has no NVIDIA driver (libcuda.so.1 is not found)") from None
    if result.value:
        raise ConfigError(f"--devices cuda: the NVIDIA driver does not start: {result.name}")
    if not torch.cuda.is_available():
        raise _torch_finds_no_gpu(bindings)
    return bindings


def _torch_finds_no_gpu(bindings: Any) -> ConfigError:
    """Return the error that says why torch cannot use a GPU although the driver starts, and what to do."""
    if torch.version.cuda is None:
        return ConfigError(f"--devices cuda: torch {torch.__version__} cannot use CUDA; install a CUDA build of torch")
    result, version = bindings.cuDriverGetVersion()
    known = "another version" if result.value else f"{version // 1000}.{version % 1000 // 10}"
    return ConfigError(
        f"--devices cuda: torch {torch.__version__} is for CUDA {torch.version.cuda} and finds no GPU, the NVIDIA "
        f"driver for CUDA up to {known}; update the driver, or install a build of torch for it"
    )


def count_gpus(bindings: Any) -> int:
    """Return the number of GPUs that the driver shows to this process."""
    result, count = bindings.cuDeviceGetCount()
    if result.value:
        raise ConfigError(f"--devices cuda: cannot count GPUs: {result.name}")
    return int(count)


def check_ordinals(ordinals: Sequence[int], num_gpus: int) -> None:
    """Raise ConfigError, which names the GPUs there are, if one of `ordinals` is not."""
    known = ", ".join(f"cuda:{i}" for i in range(num_gpus)) or "none"
    if missing := [i for i in ordinals if i >= num_gpus]:
        raise ConfigError(f"--devices: there is no cuda:{missing[0]}; this machine has {num_gpus} GPU(s): {known}")


class CudaDriver:
    """`Driver` of one GPU, in the primary context that torch uses too."""

    def __init__(self, ordinal: int, bindings: Any = None) -> None:
        self._cuda = d = bindings or load_bindings()
        self.ordinal, self.torch_device = ordinal, torch.device("cuda", ordinal)
        check_ordinals([ordinal], count_gpus(d))
        self._device = self._ok(d.cuDeviceGet(ordinal), "cuDeviceGet")
        supported = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._ok(d.cuDeviceGetAttribute(supported, self._device), "cuDeviceGetAttribute"):
            raise ConfigError(f"cuda:{ordinal} has no virtual memory management (it needs Pascal or later, on Linux)")
        properties = torch.cuda.get_device_properties(ordinal)
        self.gpu_name, self.num_multiprocessors = properties.name, properties.multi_processor_count
        self._streams: dict[Stream, torch.cuda.ExternalStream] = {}  # as torch knows them
        self._graph_pool: Any = None  # memory that all graphs of this device share
        self._context: Any = self._ok(d.cuDevicePrimaryCtxRetain(self._device), "cuDevicePrimaryCtxRetain")
        self._prop = d.CUmemAllocationProp()
        self._prop.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._prop.location = self._location(ordinal)
        minimum = d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._prop, minimum))

    def memory(self) -> tuple[int, int]:
        """See `Driver.memory`."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def can_access(self, ordinal: int) -> bool:
        """See `Driver.can_access`."""
        if ordinal == self.ordinal:
            return True
        other = self._ok(self._cuda.cuDeviceGet(ordinal), "cuDeviceGet")
        return bool(self._ok(self._cuda.cuDeviceCanAccessPeer(self._device, other), "cuDeviceCanAccessPeer"))

    def create(self, num_bytes: int) -> int:
        """See `Driver.create`."""
        return int(self._call("cuMemCreate", num_bytes, self._prop, 0))

    def release(self, handle: int) -> None:
        """See `Driver.release`."""
        self._call("cuMemRelease", handle)

    def reserve(self, num_bytes: int) -> int:
        """See `Driver.reserve`."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """See `Driver.free`."""
        self._call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """See `Driver.map`."""
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def set_access(self, address: int, num_bytes: int) -> None:
        """See `Driver.set_access`."""
        descriptor = self._cuda.CUmemAccessDesc()
        descriptor.location = self._location(self.ordinal)
        descriptor.flags = self._cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, num_bytes, [descriptor], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        """See `Driver.unmap`."""
        self._call("cuMemUnmap", address, num_bytes)

    def take_stream(self) -> Stream:
        """See `Driver.take_stream`."""
        with _idle_streams_change:
            if idle := idle_streams[self.ordinal]:
                return idle.pop()
        return int(self._call("cuStreamCreate", int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def return_stream(self, stream: Stream) -> None:
        """See `Driver.return_stream`."""
        with _idle_streams_change:
            idle_streams[self.ordinal].append(stream)

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """See `Driver.on`."""
        return torch.cuda.stream(self._torch_stream(stream))

    def current_stream(self) -> Stream:
        """See `Driver.current_stream`."""
        return int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def record(self, stream: Stream, *, is_timed: bool = False) -> Event:
        """See `Driver.record`. Blocking events sleep in the kernel; the default ones spin."""
        event = torch.cuda.Event(enable_timing=is_timed, blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._torch_stream(stream))
        return event

    def seconds(self, first: Event, last: Event) -> float:
        """See `Driver.seconds`."""
        return float(first.elapsed_time(last)) / 1e3

    def wait(self, stream: Stream, event: Event) -> None:
        """See `Driver.wait`."""
        self._torch_stream(stream).wait_event(event)

    def synchronize(self, stream: Stream) -> None:
        """See `Driver.synchronize`."""
        self._call("cuStreamSynchronize", stream)

    def synchronize_event(self, event: Event) -> None:
        """See `Driver.synchronize_event`."""
        self._call("cuEventSynchronize", event.cuda_event)

    def synchronize_all(self) -> None:
        """See `Driver.synchronize_all`."""
        torch.cuda.synchronize(self.torch_device)

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `Driver.capture`. torch.cuda.graph would synchronize the GPU and empty its cache under other devices."""
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._graph_pool, capture_error_mode="thread_local")
        try:
            work()
        finally:  # where `work` has failed this raises as well, and torch takes the capture for one that goes on
            graph.capture_end()
        return graph

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """See `Driver.tensor`. torch's own CUDA graph trees make storages like this."""
        make: Any = torch._C._construct_storage_from_data_pointer
        flat = torch.empty(0, dtype=torch.uint8, device=self.torch_device)
        return flat.set_(make(address, self.torch_device, num_bytes), 0, (num_bytes,), (1,))

    def pin(self, address: int, num_bytes: int) -> None:
        """See `Driver.pin`."""
        self._call("cuMemHostRegister", address, num_bytes, self._cuda.CU_MEMHOSTREGISTER_PORTABLE)

    def unpin(self, address: int) -> None:
        """See `Driver.unpin`."""
        self._call("cuMemHostUnregister", address)

    def pinned(self, num_bytes: int) -> Tensor:
        """See `Driver.pinned`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def close(self) -> None:
        """See `Driver.close`. Idempotent."""
        if self._context is not None:
            self._ok(self._cuda.cuDevicePrimaryCtxRelease(self._device), "cuDevicePrimaryCtxRelease")
            self._context = None

    def _torch_stream(self, stream: Stream) -> torch.cuda.ExternalStream:
        known = self._streams.get(stream)
        if known is None:
            known = torch.cuda.ExternalStream(stream, device=self.torch_device)  # type: ignore[no-untyped-call]
            self._streams[stream] = known
        return known

    def _location(self, ordinal: int) -> Any:
        location = self._cuda.CUmemLocation()
        location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = ordinal
        return location

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the driver in this GPU's context: current contexts belong to threads, and any thread may come here."""
        self._ok(self._cuda.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
        return self._ok(getattr(self._cuda, name)(*arguments), name)

    def _ok(self, result: tuple[Any, ...], call: str) -> Any:
        status, *values = result
        if status.value:
            raise DeviceError(f"cuda:{self.ordinal}: {call} failed: {status.name}")
        return values[0] if len(values) == 1 else tuple(values)
