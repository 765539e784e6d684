"""One simulated server: an engine on a machine of its own, and what is seen of it. All share one clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kunserve.config import EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.launch.assemble import assemble
from kunserve.engine.regroup.control import OverloadControl
from kunserve.engine.request import Output, Request
from kunserve.engine.signals import loop_time
from kunserve.engine.text.stream import Sink
from kunserve.errors import KunServeError
from kunserve.model.config import ModelConfig
from kunserve.observe.metrics import Metrics
from kunserve.planner.microbatch import Lookahead
from kunserve.sim.machine import NoWeights, SimMachine
from kunserve.sim.nodes.router import Load
from kunserve.sim.report import Answer, Sample


@dataclass(slots=True)
class _Client(Sink):
    """The receiver of a request's outputs: it notes their times and keeps no tokens."""

    answer: Answer
    loop: asyncio.AbstractEventLoop
    on_end: Callable[[], None]

    def put(self, output: Output) -> None:
        """See `OutputStream.put`."""
        if output.token_ids:
            self.answer.token(self.loop.time())
        if output.finish_reason is not None:
            self.answer.is_finished = True
            self.on_end()

    def fail(self, error: KunServeError) -> None:
        """See `OutputStream.fail`."""
        self.answer.failure = error.message
        self.on_end()


class _QuietMetrics(Metrics):
    """Nobody scrapes a simulation: what is counted for every token is not."""

    def inter_tokens(self, seconds: Sequence[float]) -> None:
        """Count nothing."""


@dataclass(slots=True)
class Node:
    """A server that is up."""

    machine: SimMachine
    engine: Engine
    control: OverloadControl
    started_s: float
    num_open: int = 0  # requests that have not ended
    stage_seconds: dict[int, tuple[float, float]] = field(default_factory=dict)
    # of each chain: seconds of its stages with work, and those with work anywhere in the chain

    @classmethod
    async def start(cls, machine: SimMachine, model: ModelConfig, config: EngineConfig, max_model_len: int) -> Node:
        """Assemble an engine, as a launch does, and start it."""
        lookahead = None
        if config.microbatching == "lookahead":  # with the constants that the devices have
            lookahead = Lookahead(machine.cost, model.num_layers, config.num_batched_tokens)
        engine, control = await assemble(
            machine,
            model,
            config,
            "simulated",
            max_model_len,
            NoWeights,
            None,
            lookahead=lookahead,
            metrics=_QuietMetrics,
        )
        await engine.start()
        return cls(machine, engine, control, loop_time())

    async def stop(self) -> None:
        """Assert what holds at the end of every run, and free the devices."""
        self.engine.check()
        await self.engine.stop()
        self.machine.close()

    def submit(self, request: Request, answer: Answer, on_end: Callable[[], None]) -> None:
        """Send a request; `on_end` is called once it ended, at once if it was refused."""

        def end() -> None:
            self.num_open -= 1
            on_end()

        self.num_open += 1
        try:
            self.engine.submit_to(request, _Client(answer, asyncio.get_running_loop(), end))
        except KunServeError as error:
            answer.failure = error.message
            end()

    def load(self) -> Load:
        """Return what a router sees of this server."""
        num_blocks = sum(group.num_blocks for group in self.engine.groups)
        num_used = sum(group.num_used for group in self.engine.groups)
        return Load(self.num_open, self.engine.scheduler.num_waiting, num_used / max(1, num_blocks), num_blocks)

    def demand(self) -> float:
        """Return this server's gauge `kunserve:demand_over_undropped`."""
        return self.control.demand_over_undropped()

    def sample(self) -> Sample:
        """Return this server's memory and requests now, and note how busy its chains are."""
        engine, now = self.engine, loop_time()
        for group in engine.groups:
            if len(group.stages) > 1:
                active_s = group.occupancy.active_s(now) * len(group.stages)
                self.stage_seconds[group.group_id] = sum(group.occupancy.busy_s(now)), active_s
        return Sample(
            now,
            sum(group.num_blocks for group in engine.groups),
            sum(group.num_used for group in engine.groups),
            engine.scheduler.num_waiting,
            engine.num_running,
            len(engine.groups),
            engine.metrics.num_generation_tokens,
        )


def totals(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return what all servers of a run counted, added up, and the transitions of all of them."""
    engines = [node.engine for node in nodes]
    chains = [seconds for node in nodes for seconds in node.stage_seconds.values()]
    busy_s, active_s = (sum(seconds) for seconds in zip((0.0, 0.0), *chains, strict=True))
    transitions = [
        transition | ({"node": index} if len(nodes) > 1 else {})
        for index, node in enumerate(nodes)
        for transition in node.control.state()["transitions"]
    ]
    for transition in transitions:
        del transition["weight_sources"]  # there are no bytes that could come from anywhere
    return {
        "preemptions": sum(engine.scheduler.num_preemptions for engine in engines),
        "swaps": sum(engine.scheduler.swapped.num_swaps for engine in engines),
        "migrations": sum(engine.scheduler.num_migrations for engine in engines),
        "bubble_share": round(1 - busy_s / active_s, 4) if active_s else None,  # of all chains
        "num_transitions": len(transitions),
        "transitions": transitions,
    }


def prefix_hit_rate(nodes: Sequence[Node]) -> float:
    """Return the share of all prompt tokens that the prefix caches had."""
    found = [node.engine.metrics for node in nodes]
    looked_for = sum(metrics.num_looked_for_tokens for metrics in found)
    return sum(metrics.num_cached_tokens for metrics in found) / max(1, looked_for)
