"""The whole engine on GPUs whose work waits in streams, and comes in another order every time."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from fake_kernels import LaunchedKernels
from fake_timeline import TIMELINE
from test_cuda_engine import Ask, chained, generate, generate_greedily, serving, tokens_through

from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.compute.cuda.sampling import PendingTokens
from kunserve.engine.request import Request
from kunserve.engine.step.cuda_executor import CudaExecutor
from kunserve.gpu.cuda.driver import Graph
from kunserve.sampling import SamplingParams

TOPOLOGIES = {"one GPU": ((0, 0), ()), "peers": ((0, 1), (0, 1)), "through the host": ((0, 1), ())}
pytestmark = pytest.mark.usefixtures("kernels")


def drivers_of(topology: str) -> list[FakeCuda]:
    ordinals, reachable = TOPOLOGIES[topology]
    return [FakeCuda(ordinal, reachable=reachable, is_async=True) for ordinal in ordinals]


_expected: dict[Ask, list[tuple[int, ...]]] = {}  # of GPUs that do at once what they are told, once it was seen


async def expected_of(ask: Ask) -> list[tuple[int, ...]]:
    if ask not in _expected:
        async with serving([FakeCuda(), FakeCuda()], num_ahead=0) as engine:
            _expected[ask] = await tokens_through(engine, regroup=False, ask=ask)
    return _expected[ask]


@pytest.mark.parametrize("seed", range(int(os.environ.get("KUNSERVE_FAKE_GPU_ORDERS", "1"))))
@pytest.mark.parametrize(
    ("topology", "ask"),
    [
        *((topology, generate) for topology in TOPOLOGIES),
        *((t, generate_greedily) for t in ("one GPU", "through the host")),
    ],
)
async def test_same_tokens_in_any_order_of_the_streams(topology: str, ask: Ask, seed: int) -> None:
    expected = await expected_of(ask)
    TIMELINE.begin(seed)
    drivers = drivers_of(topology)
    async with serving(drivers) as engine:
        assert isinstance(engine.executor, CudaExecutor)
        graphs = [decoder.graphs for decoder in engine.executor.decoders if decoder.graphs is not None]
        num_captures, before = [g.num_captures for g in graphs], TIMELINE.default_uses
        assert await tokens_through(engine, regroup=True, ask=ask) == expected
        outcomes = [(t["kind"], t["outcome"]) for t in engine.state()["transitions"]]
        assert outcomes == [("drop", "done"), ("restore", "done"), ("drop", "done")]
        assert len(graphs) == len(drivers) and all(g.num_replays for g in graphs)
        # While one captures, the event loop may free a pinned buffer of that stream: torch's host allocator fails then.
        assert [g.num_captures for g in graphs] == num_captures and all(num_captures)
        assert TIMELINE.default_uses == before  # all devices of a GPU would stand in one queue
    assert all(driver.is_clean() for driver in drivers)
    legacy = {TIMELINE.legacy(ordinal) for ordinal in (0, 1)}
    assert not legacy & {stream for copy in TIMELINE.copies for stream in copy}  # all would stand in one queue


async def test_a_greedy_decode_step_launches_its_arrays_graphs_and_tokens_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is launched while no prompt is computed: also where a step begins with tokens that the host has not seen."""
    async with serving(drivers_of("one GPU")) as engine:
        assert isinstance(engine.executor, CudaExecutor)
        steps = counted_steps(monkeypatch, engine.executor)
        tokens = await generate_greedily(engine, 1, 8)
    assert len(steps) == len(tokens)
    # The arrays, what attention is planned, and the tokens; embedding, one run of layers, head. The first of these may
    # begin with a token that no graph has chosen.
    assert set(steps[2:]) == {(3, 3)} and steps[1] in {(3, 3), (4, 3)}


async def test_a_chain_that_is_cut_within_a_run_of_layers_launches_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers are one run: each half of them is two layers with graphs of their own."""
    num_eager, rotate_and_append = 0, LaunchedKernels.rotate_and_append

    def counted(*given: Any, **more: Any) -> None:
        nonlocal num_eager
        num_eager += 1
        rotate_and_append(*given, **more)

    async with serving(drivers_of("through the host")) as engine:
        chain = await chained(engine)
        assert [(stage.first_layer, stage.last_layer) for stage in chain.stages] == [(0, 2), (2, 4)]
        assert isinstance(engine.executor, CudaExecutor)
        graphs = [decoder.graphs for decoder in engine.executor.decoders if decoder.graphs is not None]
        replays = [g.num_replays for g in graphs]
        monkeypatch.setattr(LaunchedKernels, "rotate_and_append", counted)
        params = SamplingParams(12, temperature=0.0, ignore_eos=True)
        # A prompt of one token is a decode step as well.
        answers = [engine.submit(Request(str(i), [3 + i], params)) for i in range(3)]
        for answer in answers:
            assert len([token async for output in answer for token in output.token_ids]) == 12
        replayed = [g.num_replays - before for g, before in zip(graphs, replays, strict=True)]
    assert num_eager == 0
    assert replayed[0] == replayed[1] >= 3 * 12 and not replayed[0] % 3  # an end and two layers in each step


def counted_steps(monkeypatch: pytest.MonkeyPatch, executor: CudaExecutor) -> list[tuple[int, int]]:
    """Return where each step's launches on its stream will be counted: those of its own, and graphs."""
    steps, launched, launch = list[tuple[int, int]](), Counter[int](), TIMELINE.launch

    def count(stream: int, *args: Any, **more: Any) -> None:
        launched[stream] += 1
        launch(stream, *args, **more)

    def counting(decoder: CudaDecoder, stream: int) -> Callable[..., PendingTokens]:
        launch_tokens, graphs, replays = decoder.launch_tokens, decoder.graphs, 0
        assert graphs is not None

        def launch_and_count(*args: Any) -> PendingTokens:
            nonlocal replays
            pending = launch_tokens(*args)
            steps.append((launched.pop(stream), graphs.num_replays - replays))
            replays = graphs.num_replays
            return pending

        return launch_and_count

    monkeypatch.setattr(TIMELINE, "launch", count)
    for decoder, device in zip(executor.decoders, executor.devices, strict=True):
        monkeypatch.setattr(decoder, "launch_tokens", counting(decoder, device.compute.stream))
    return steps


async def test_nothing_is_collected_while_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pinned buffer in a cycle, of a device that has had the same stream, would put an event into the capture."""
    capture = FakeCuda.capture

    def with_garbage(self: FakeCuda, work: Callable[[], None]) -> Graph:
        there, held = torch.zeros(8, device=self.torch_device), list[Any]()
        host = self.pinned(32).view(torch.float32)
        host.copy_(there, non_blocking=True)
        self.synchronize(self.current_stream())
        held += [held, host]  # garbage, when this function has returned, or as good as
        del host

        def work_and_litter() -> None:
            held.clear() if gc.isenabled() else None
            work()

        return capture(self, work_and_litter)

    monkeypatch.setattr(FakeCuda, "capture", with_garbage)
    async with serving(drivers_of("one GPU")) as engine:
        assert len(await generate(engine, 1, 5)) == 5
    assert gc.isenabled()
