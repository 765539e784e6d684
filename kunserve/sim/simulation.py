"""A simulation: engines as launched, on simulated devices, answering the rows of a trace behind a router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from kunserve.config import EngineConfig
from kunserve.engine.request import Request
from kunserve.engine.signals import loop_time
from kunserve.model.config import ModelConfig
from kunserve.sampling import SamplingParams
from kunserve.sim.clock import simulate
from kunserve.sim.machine import TOKEN, SimMachine
from kunserve.sim.nodes.node import Node, prefix_hit_rate, totals
from kunserve.sim.nodes.router import Least, Router
from kunserve.sim.nodes.scaler import LOOK_EVERY_S, Scaler
from kunserve.sim.prompts import ANY_TOKEN, make_prompt
from kunserve.sim.report import Answer, Record, by_answer, summarize
from kunserve.sim.traces import TraceRow, cut

SAMPLE_EVERY_S = 1.0
STOPS = frozenset({TOKEN.token_id})


class Simulation:
    """One run. `rows`: what arrives when; outputs are exactly as long as a row says.

    With `max_tokens`, every request asks for that many and ends by a stop token, so that no policy knows how long it
    will be; without, each asks for exactly what it gets. `make_machine` makes the devices of one server. There are
    `num_nodes` servers when the first row arrives, and a `scaler` may start more.
    """

    def __init__(
        self,
        make_machine: Callable[[], SimMachine],
        model: ModelConfig,
        config: EngineConfig,
        rows: Sequence[TraceRow],
        max_model_len: int,
        *,
        num_nodes: int = 1,
        router: Router | None = None,
        scaler: Scaler | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._make_machine, self._model = make_machine, model
        self._config = config
        self._rows, self._max_model_len, self._max_tokens = rows, max_model_len, max_tokens
        self._num_nodes, self._router, self._scaler = num_nodes, router or Least(), scaler
        self._nodes: list[Node] = []
        self.record = Record()

    def run(self) -> dict[str, Any]:
        """Simulate to the last answer, and return the report."""
        return simulate(self._run())

    async def _run(self) -> dict[str, Any]:
        for _ in range(self._num_nodes):
            await self._start()
        watching = [asyncio.create_task(self._sample())]
        if self._scaler is not None:
            watching.append(asyncio.create_task(self._scale(self._scaler)))
        await self._send()
        self.record.elapsed_s = loop_time()
        for task in watching:
            task.cancel()
        for node in self._nodes:
            await node.stop()
        return self._report()

    async def _start(self) -> None:
        self._nodes.append(await Node.start(self._make_machine(), self._model, self._config, self._max_model_len))

    async def _scale(self, scaler: Scaler) -> None:
        """Start servers as the gauge asks. They get new requests only: those that wait elsewhere stay there."""

        async def start() -> None:
            await asyncio.sleep(scaler.start_s)
            await self._start()

        num_started = len(self._nodes)
        async with asyncio.TaskGroup() as starting:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                num_wanted = scaler.num_wanted([node.demand() for node in self._nodes], num_started)
                for _ in range(num_wanted - num_started):
                    starting.create_task(start())
                num_started = num_wanted

    async def _send(self) -> None:
        """Submit every row at its time, and return when all are answered."""
        start_s, num_open, last_ended = loop_time(), 0, asyncio.Event()

        def end() -> None:
            nonlocal num_open
            num_open -= 1
            last_ended.set()

        for i, row in enumerate(self._rows):
            if (delay_s := start_s + row.at_s - loop_time()) > 0:
                await asyncio.sleep(delay_s)
            row = cut(row, self._nodes[0].engine.limits.max_model_len)
            answer = Answer(loop_time(), row.num_prompt_tokens)
            self.record.answers.append(answer)
            token_ids, keys = self._prompt(row, i, row.num_prompt_tokens)
            request = Request(f"{i}", token_ids, self._params(row))
            request.block_keys = keys
            num_open += 1
            self._pick(keys).submit(request, answer, end)
        while num_open:
            last_ended.clear()
            await last_ended.wait()

    def _params(self, row: TraceRow) -> SamplingParams:
        """Return what a request asks for. Each token that is sampled is a stop token: the first that may end it."""
        longest = self._nodes[0].engine.limits.max_model_len - row.num_prompt_tokens
        asked = row.num_output_tokens if self._max_tokens is None else min(self._max_tokens, longest)
        return SamplingParams(asked, row.num_output_tokens, seed=0, stop_token_ids=STOPS)

    def _pick(self, keys: Sequence[bytes]) -> Node:
        if len(self._nodes) == 1:
            return self._nodes[0]
        return self._nodes[self._router.pick([node.load() for node in self._nodes], keys)]

    def _prompt(self, row: TraceRow, number: int, num_tokens: int) -> tuple[list[int], list[bytes]]:
        """Return token ids and, if anybody looks for them, keys of full blocks."""
        if not self._config.enable_prefix_caching:
            return [ANY_TOKEN] * num_tokens, []
        return make_prompt(row, number, num_tokens, self._config.block_size)

    async def _sample(self) -> None:
        while True:
            samples = [node.sample() for node in self._nodes]
            self.record.samples.append(reduce(lambda a, b: a + b, samples))
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _report(self) -> dict[str, Any]:
        cache = {}
        if self._config.enable_prefix_caching:
            cache["prefix_hit_rate"] = round(prefix_hit_rate(self._nodes), 4)  # of all prompt tokens
        nodes = {}
        if self._num_nodes > 1 or self._scaler is not None:
            nodes["node_started_s"] = [round(node.started_s, 3) for node in self._nodes]
        return (
            summarize(self.record, self._config.block_size)
            | cache
            | nodes
            | totals(self._nodes)
            | {"answers": by_answer(self.record)}
        )
