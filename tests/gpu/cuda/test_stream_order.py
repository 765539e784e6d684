"""Events and order of streams as the fake has them: what waits for what, and for how long anybody may name it."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda
from fake_gpu_tensors import on_gpu
from fake_pieces import RuleBrokenError
from fake_timeline import TIMELINE, take_broken

from kunserve.errors import DeviceError
from kunserve.gpu.cuda.stream import StreamQueue

# --- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["let go of", "destroyed"])
def test_an_event_lasts_until_nobody_waits_for_it(driver: FakeCuda, how: str) -> None:
    first, second = driver.take_stream(), driver.take_stream()
    for is_kept in (True, False):
        with driver.on(first):
            x = on_gpu()
        made = driver.record(first)
        driver.wait(second, made)
        if is_kept:
            driver.synchronize(second)
        if how == "destroyed":
            made.destroy()
        del made, x
        broken = f"an event of stream {first} was destroyed while a stream waits for it"
        assert take_broken() == ("" if is_kept else broken)
        driver.synchronize(second)


async def test_what_was_launched_keeps_what_it_came_after_until_it_is_finished(driver: FakeCuda) -> None:
    first, second = (StreamQueue(driver, name) for name in ("first", "second"))
    driver.submit(first.stream)
    made = await first.launch(on_gpu)
    launched = [await second.launch(on_gpu, [made]) for _ in range(2)]
    del made
    for queue in (first, second):
        await queue.launch(lambda: None)  # nor does a thread remember what it did last
    assert not take_broken()
    driver.complete(first.stream)
    for each in launched:
        assert each.after
        await second.finish(each)
        assert not each.after  # else each step would keep all before it
    launched.clear()
    assert not take_broken()
    for queue in (first, second):
        queue.close()


@pytest.mark.parametrize("call", ["wait", "synchronize_event"])
def test_an_event_that_was_destroyed_is_nobodys(driver: FakeCuda, call: str) -> None:
    stream = driver.take_stream()
    event = driver.record(stream)
    driver.synchronize(stream)
    event.destroy()
    uses: dict[str, Callable[[], None]] = {
        "wait": lambda: driver.wait(stream, event), "synchronize_event": lambda: driver.synchronize_event(event),
    }  # fmt: skip
    with pytest.raises(RuleBrokenError, match="used after it had been destroyed"):
        uses[call]()


# --- order ----------------------------------------------------------------------------------------------------------


def test_what_reads_before_a_copy_has_filled_is_found_whatever_is_drawn(driver: FakeCuda) -> None:
    first, second = driver.take_stream(), driver.take_stream()
    num_found = 0
    for seed in range(20):
        TIMELINE.begin(seed)
        host, x = driver.pinned(32), on_gpu()
        driver.synchronize_all()
        with driver.on(first):
            x.copy_(host.view(torch.float32), non_blocking=True)
        with driver.on(second):
            y = x * 2  # behind no event
        try:
            driver.synchronize(second)
        except RuleBrokenError:
            num_found += 1
        assert all("has not written yet" in rule for rule in TIMELINE.broken)
        take_broken()
        TIMELINE.forget_work()
        del y
    assert 5 <= num_found <= 20


def test_what_waits_for_the_event_is_right_whatever_is_drawn(driver: FakeCuda) -> None:
    first, second = driver.take_stream(), driver.take_stream()
    for seed in range(20):
        TIMELINE.begin(seed)
        host, x = driver.pinned(32), on_gpu()
        driver.synchronize_all()
        host.view(torch.float32).fill_(seed)
        with driver.on(first):
            x.copy_(host.view(torch.float32), non_blocking=True)
        copied = driver.record(first)
        driver.wait(second, copied)
        with driver.on(second):
            assert (x * 2).tolist() == [2.0 * seed] * 8


def test_the_default_stream_waits_for_nobody(driver: FakeCuda) -> None:
    """What is made on it is there for others when the GPU was waited for, and not before."""
    stream, found = driver.take_stream(), set()
    for seed in range(20):
        TIMELINE.begin(seed)
        x = on_gpu(5.0)
        with driver.on(stream):
            try:
                found.add((x + 0).tolist()[0])
            except RuleBrokenError:
                found.add("too early")
        take_broken()
        TIMELINE.forget_work()
    assert found == {5.0, "too early"}


def test_who_relies_on_the_default_stream_is_found_at_every_even_seed(driver: FakeCuda) -> None:
    stream = driver.take_stream()
    for seed in range(0, 20, 2):
        TIMELINE.begin(seed)
        x = on_gpu(5.0)
        with driver.on(stream), pytest.raises(RuleBrokenError, match="has not written yet"):
            (x + 0).tolist()
        take_broken()
        TIMELINE.forget_work()


def test_the_default_stream_and_blocking_ones_wait_for_each_other(driver: FakeCuda) -> None:
    """As CUDA has it; ours are none of those, so that no launch of torch's on the default stream holds them up."""
    blocking = TIMELINE.create(driver, is_blocking=True)
    for seed in range(20):
        TIMELINE.begin(seed)
        x = on_gpu(5.0)  # on the default stream
        with driver.on(blocking):
            y = x + 1
        z = y + 1
        with driver.on(blocking):
            assert (z + 1).tolist() == [8.0] * 8


def test_a_host_buffer_must_stay_as_it_is_until_it_was_copied(driver: FakeCuda) -> None:
    stream = driver.take_stream()
    with driver.on(stream):
        host, x = driver.pinned(32), on_gpu()
        x.copy_(host.view(torch.float32), non_blocking=True)
        host.fill_(1)
        with pytest.raises(RuleBrokenError, match="written before it had been copied"):
            driver.synchronize(stream)
    take_broken()
    TIMELINE.forget_work()


def test_memory_that_is_not_locked_is_read_before_the_copy_returns(driver: FakeCuda) -> None:
    with driver.on(driver.take_stream()):
        host, x = torch.full((8,), 2.0), on_gpu()
        x.copy_(host, non_blocking=True)
        host.fill_(7)
        assert x.tolist() == [2.0] * 8


def test_a_fault_is_seen_by_who_waits_next_and_by_all_after(driver: FakeCuda) -> None:
    stream = driver.take_stream()
    with driver.on(stream):
        ids = torch.full((1,), 99, device="gpu:0")
        x = on_gpu().index_select(0, ids)  # out of range: nothing is said here
        assert x.shape == (1,)
        with pytest.raises(DeviceError, match="CUDA_ERROR_ASSERT"):
            driver.synchronize(stream)
    with pytest.raises(DeviceError, match="CUDA_ERROR_ASSERT"):
        driver.create(GRANULARITY)
    driver.error = None
    TIMELINE.forget_work()


def test_memory_is_given_to_nobody_before_it_is_known_who_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may take memory at any time: work that has nothing to do with it would seem to read it."""
    tensor, seen = on_gpu(), list[bool]()
    memory = ref(tensor.inner)
    TIMELINE.drain()
    monkeypatch.setattr(TIMELINE, "freed", lambda _: seen.append(memory() is not None))
    del tensor
    assert seen == [True] and memory() is None
