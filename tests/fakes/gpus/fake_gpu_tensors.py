"""Tensors on GPUs that are not there: every operation waits in the stream that is current, as on a real one.

torch sees a device of its own kind, "gpu", whose operations all come to `_dispatch`. Shapes are known at once, contents
only when the timeline gets there: until then they are poison. What looks at contents on the host waits, as it does in
life. Memory is torch's (a `Block`, freed as soon as nobody holds it) or mapped (`FakeCuda` owns it).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import numpy as np
import torch
from fake_pieces import RuleBrokenError, Span
from fake_timeline import TIMELINE, Block
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

POISON = 0xFF  # NaN in floats, -1 in integers
aten = torch.ops.aten
_LOOK_AT_CONTENTS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.is_nonzero.default, aten._unique2.default,
}  # fmt: skip
# Of the first tensor they touch only what an index names: who orders that, our code must know.
_SPARSE = {
    aten.index_select.default, aten.index_copy_.default, aten.index_put_.default, aten.index.Tensor,
    aten._index_put_impl_.default, aten.embedding.default,
}  # fmt: skip


class MappedMemory:
    """A reserved range of addresses, mapped or not, to which one GPU gets access."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal, self.used_on = ordinal, set[int]()


class GpuTensor(Tensor):
    """A tensor on a GPU that is not there: `inner` has its bytes, `block` is the memory that they are in."""

    inner: Any  # a Tensor; torch has a method of that name
    block: Block | MappedMemory

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, ordinal: int, block: Block | MappedMemory) -> GpuTensor:
        make: Any = torch.Tensor._make_wrapper_subclass
        with torch.inference_mode(False):  # views of what was made outside must be as it is: so all are alike
            made: GpuTensor = make(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=torch.device("gpu", ordinal),
            )  # fmt: skip
        made.inner, made.block = inner, block
        return made

    def tolist(self) -> Any:
        """As any tensor's; torch has none for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _dispatch(func, args, kwargs or {})


def span_of(inner: Tensor) -> Span:
    """Return the addresses from the first byte of a tensor to its last."""
    if not inner.numel():
        return Span(0, 0)
    last = sum((n - 1) * stride for n, stride in zip(inner.shape, inner.stride(), strict=True))
    return Span(inner.data_ptr(), inner.data_ptr() + (last + 1) * inner.element_size())


def new_tensor(shape: Sequence[int], strides: Sequence[int] | None, dtype: torch.dtype, ordinal: int) -> GpuTensor:
    """Take memory from torch's allocator, for the stream that is current; it holds poison."""
    with torch.inference_mode(False):
        inner = torch.empty(shape, dtype=dtype) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)
    ctypes.memset(inner.data_ptr(), POISON, inner.untyped_storage().nbytes())
    return GpuTensor(inner, ordinal, Block(TIMELINE, span_of(inner), TIMELINE.current(ordinal), inner))


def on_gpu(value: float = 1.0, size: int = 8) -> Tensor:
    """Make a tensor on the first GPU, of one number."""
    return torch.full((size,), value, device="gpu:0")


def new_pinned(num_bytes: int) -> Tensor:
    """Take pinned memory from torch's host allocator, uint8."""
    TIMELINE.pinned_may_be_taken()
    array = np.full(num_bytes, POISON, np.uint8)
    start = array.ctypes.data
    block = Block(TIMELINE, Span(start, start + num_bytes), 0, is_pinned=True)
    _pinned[start] = block

    def free() -> None:
        del _pinned[start]

    del block  # the table alone holds it
    finalize(array, free)
    with torch.inference_mode(False):
        return torch.from_numpy(array)


_pinned: dict[int, Block] = {}
_registered: dict[int, int] = {}  # host memory that was locked in place: torch's allocator knows nothing of it


def register(address: int, num_bytes: int) -> None:
    """Lock host memory in place."""
    _registered[address] = address + num_bytes


def unregister(address: int) -> None:
    """Undo `register`."""
    del _registered[address]


def launch(
    work: Callable[..., object], reads: Sequence[Tensor], writes: Sequence[Tensor], others: Sequence[Tensor] = ()
) -> None:
    """Launch a kernel of our own, as Triton does: on the GPU that is current. `work` gets all tensors as they are then.

    others: what it touches only where some index says.
    """
    tensors = [t for t in (*reads, *writes, *others) if isinstance(t, GpuTensor)]
    if any(t.device.index != TIMELINE.current_gpu for t in tensors):
        raise RuleBrokenError(f"a kernel was launched while GPU {TIMELINE.current_gpu} is current")
    inner = [t.inner if isinstance(t, GpuTensor) else t for t in (*reads, *writes, *others)]
    if not tensors:  # a GPU that does all at once
        work(*inner)
        return
    _enqueue(lambda: work(*inner), tensors, [t for t in reads if isinstance(t, GpuTensor)], writes)


def _enqueue(run: Callable[[], object], tensors: Sequence[Any], reads: Sequence[Any], writes: Sequence[Any]) -> None:
    ordinal = tensors[0].device.index
    stream = TIMELINE.current(ordinal)
    for tensor in tensors:
        _check_use(tensor, ordinal, stream)

    def work() -> None:
        with torch.inference_mode():
            run()

    TIMELINE.launch(stream, work, [span_of(t.inner) for t in reads], [span_of(t.inner) for t in writes])


def _check_use(tensor: GpuTensor, ordinal: int, stream: int) -> None:
    """Tensors must be the GPU's own, or mapped so that it has access."""
    block = tensor.block
    if isinstance(block, Block):
        TIMELINE.uses(block, stream)
        return
    if ordinal != block.ordinal:
        raise RuleBrokenError(f"GPU {ordinal} has no access to what is mapped on GPU {block.ordinal}")


def _wait_here(ordinal: int) -> None:
    """Block until the current stream has done all, as whatever looks at contents does."""
    TIMELINE.forbid_in_capture("look at what a GPU computes")
    stream = TIMELINE.current(ordinal)
    TIMELINE.synchronize(TIMELINE.record(stream), TIMELINE.owner(stream))


# --- operations -----------------------------------------------------------------------------------------------------


def _tree_map(change: Callable[[Any], Any], value: Any) -> Any:
    """Return arguments, or results, with each leaf changed. torch's own, for any kind of tree, takes far longer."""
    if isinstance(value, tuple | list):
        return type(value)([_tree_map(change, one) for one in value])
    if isinstance(value, dict):
        return {name: _tree_map(change, one) for name, one in value.items()}
    return change(value)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for one in value for leaf in _leaves(one)]
    return [leaf for one in value.values() for leaf in _leaves(one)] if isinstance(value, dict) else [value]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _key(value: Any) -> Any:
    """Return what a result's shape follows from, as something that has a hash."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return tuple((name, _key(one)) for name, one in value.items()) if isinstance(value, dict) else (type(value), value)


_known: dict[Any, Any] = {}  # tensors without contents, as an operation returns them


def _results(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return tensors without contents that are as an operation's results. Most operations come again and again."""
    key = func, _key(args), _key(kwargs)
    if key not in _known:
        _known[key] = func(*_tree_map(_meta, args), **_tree_map(_meta, kwargs))
    return _known[key]


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # In inference mode an operation that is made of others comes as it is: `to` would pass for a view.
    if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
        return parts
    if func is aten.copy_.default:
        return _copy(args[0], args[1], is_async=bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
    tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, GpuTensor)]
    first, target = tensors[0], kwargs.get("device")
    if func is aten._to_copy.default and target is not None and target != first.device:
        return _to_copy(first, target, kwargs)
    if func is aten.record_stream.default:
        raise RuleBrokenError("no memory is recorded for streams: whoever frees it after a fault ends the process")
    if func in _LOOK_AT_CONTENTS or _has_mask(func, args):
        _wait_here(first.device.index)
        found = func(*_tree_map(_inner, args), **_tree_map(_inner, kwargs))
        return _wrapped_now(found, first.device.index)
    returns = [r.alias_info for r in func._schema.returns]
    if any(alias is not None and not alias.is_write for alias in returns):
        with torch.inference_mode(False):
            seen = func(*_tree_map(_inner, args), **_tree_map(_inner, kwargs))
        return _tree_map(lambda t: GpuTensor(t, first.device.index, first.block) if isinstance(t, Tensor) else t, seen)
    return _compute(func, args, kwargs, tensors)


def _has_mask(func: Any, args: tuple[Any, ...]) -> bool:
    if func not in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        return False
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _wrapped_now(found: Any, ordinal: int) -> Any:
    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = new_tensor(value.shape, None, value.dtype, ordinal)
        made.inner.copy_(value)
        return made

    return _tree_map(wrap, found)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[GpuTensor]) -> Any:
    """Launch what makes new tensors, or writes into those that it is given."""
    ordinal = tensors[0].device.index
    if any(t.device.index != ordinal for t in tensors):
        raise RuleBrokenError(f"{func}: tensors of several GPUs")
    for value in _leaves((args, kwargs)):
        if isinstance(value, Tensor) and not isinstance(value, GpuTensor) and value.dim() and func not in _SPARSE:
            raise RuleBrokenError(f"{func}: a tensor in host memory")
    written = [value for a, value in _named(func, args, kwargs) if a.alias_info is not None and a.alias_info.is_write]
    inner_args, inner_kwargs = _tree_map(_inner, args), {k: _inner(v) for k, v in kwargs.items() if k != "device"}
    reads = [t for t in tensors if not (func in _SPARSE and t is args[0])]
    if written:
        writes = [t for t in written if not (func in _SPARSE and t is args[0])]
        _enqueue(lambda: func(*inner_args, **inner_kwargs), tensors, reads, writes)
        return written[0] if len(written) == 1 else tuple(written)
    shapes = _results(func, args, kwargs)
    target = kwargs.get("device")
    where = ordinal if target is None or target.index is None else target.index
    made = _tree_map(lambda m: new_tensor(m.shape, m.stride(), m.dtype, where), shapes)
    outs = _leaves(made)
    if where != ordinal:  # empty_like on another GPU: nothing is computed
        return made
    plain = [out.inner for out in outs]

    def run() -> None:
        for out, value in zip(plain, _leaves(func(*inner_args, **inner_kwargs)), strict=True):
            out.copy_(value)

    _enqueue(run, [*tensors, *outs], reads, outs)
    return made


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    declared = func._schema.arguments
    given = list(zip(declared, args, strict=False))
    by_name = {a.name: a for a in declared}
    return given + [(by_name[name], value) for name, value in kwargs.items()]


# --- copies ---------------------------------------------------------------------------------------------------------


def _to_copy(tensor: GpuTensor, target: torch.device, kwargs: dict[str, Any]) -> Tensor:
    dtype = kwargs.get("dtype") or tensor.dtype
    if target.type == "cpu":
        made = torch.empty(tensor.shape, dtype=dtype)
    else:
        made = new_tensor(tensor.shape, None, dtype, target.index)
    return _copy(made, tensor, is_async=bool(kwargs.get("non_blocking")))


def _host_block(inner: Tensor) -> tuple[bool, Block | None]:
    """Return whether host memory is locked, and what torch's allocator knows of it."""
    address = inner.data_ptr()
    for block in list(_pinned.values()):
        if block.span.start <= address < block.span.end:
            return True, block
    return any(start <= address < end for start, end in list(_registered.items())), None


def _copy(write: Tensor, read: Tensor, *, is_async: bool) -> Tensor:
    """Copy whatever to wherever, ordered as torch orders it."""
    if isinstance(write, GpuTensor) and isinstance(read, GpuTensor):
        _copy_on_gpus(write, read)
        return write
    on_gpu = write if isinstance(write, GpuTensor) else read
    assert isinstance(on_gpu, GpuTensor)
    ordinal = on_gpu.device.index
    host = read if on_gpu is write else write
    is_locked, block = _host_block(host)
    if not is_locked:
        TIMELINE.forbid_in_capture("copy from or to memory that is not locked")
    if block is not None:
        block.used_on.add(TIMELINE.current(ordinal))
    if on_gpu is write:
        _to_gpu(on_gpu, read, is_locked=is_locked)
    else:
        assert isinstance(read, GpuTensor)
        inner, to = read.inner, write
        if is_locked and to.is_contiguous():
            to.view(-1).view(torch.uint8).fill_(POISON)  # whoever looks too early sees it
        _enqueue_host(lambda: to.copy_(inner), on_gpu, reads=[span_of(inner)], writes=[span_of(to)])
    if not (is_async and is_locked):
        _wait_here(ordinal)
    return write


def _to_gpu(write: GpuTensor, read: Tensor, *, is_locked: bool) -> None:
    """Memory that is not locked is read before the copy returns; what is locked must not change until it has run."""
    to = write.inner
    with TIMELINE.change:  # no work runs in between
        as_it_was = read.clone()
        # Else the host has written it last, so that only the host can have changed it.
        is_filled_by_gpu = TIMELINE.recording() is not None or TIMELINE.is_written(span_of(read))

    def run() -> None:
        if is_locked and not is_filled_by_gpu and not _same_bytes(read, as_it_was):
            raise RuleBrokenError("a host buffer was written before it had been copied")
        to.copy_(read if is_locked else as_it_was)

    reads = [span_of(read)] if is_locked else []
    _enqueue_host(run, write, reads=reads, writes=[span_of(to)])


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def _enqueue_host(run: Callable[[], object], on_gpu: GpuTensor, reads: list[Span], writes: list[Span]) -> None:
    stream = TIMELINE.current(on_gpu.device.index)
    _check_use(on_gpu, on_gpu.device.index, stream)

    def work() -> None:
        with torch.inference_mode():
            run()

    TIMELINE.launch(stream, work, reads, writes)


def _copy_on_gpus(write: GpuTensor, read: GpuTensor) -> None:
    """On the current stream of the source's GPU, between two events, as torch copies between GPUs."""
    to, inner = write.inner, read.inner
    source, target = read.device.index, write.device.index
    if source == target:
        _enqueue(lambda: to.copy_(inner), [write, read], [read], [write])
        return
    out, into = TIMELINE.current(source), TIMELINE.current(target)
    TIMELINE.copies.append((out, into))
    TIMELINE.wait_as_torch(out, into)
    _check_use(read, source, out)
    _check_use(write, source, out)  # the source writes

    def work() -> None:
        with torch.inference_mode():
            to.copy_(inner)

    TIMELINE.launch(out, work, [span_of(inner)], [span_of(to)])
    TIMELINE.wait_as_torch(into, out)


# --- torch's side of it ---------------------------------------------------------------------------------------------


def _empty(size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> GpuTensor:
    return new_tensor(size, None, dtype or torch.get_default_dtype(), torch.device(device).index or 0)


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Any:
    return new_tensor(size, stride, dtype or torch.get_default_dtype(), torch.device(device).index or 0)


def _copy_from(read: Tensor, write: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy(write, read, is_async=non_blocking)


_setup_privateuseone_for_python_backend("gpu")
_library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
