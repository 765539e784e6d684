"""A simulation: the engine as launched, on simulated devices, answering the rows of a trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from kunserve.sampling import SamplingParams
from kunserve.sim.clock import simulate
from kunserve.sim.machine import NoWeights, SimMachine
from kunserve.sim.prompts import ANY_TOKEN, make_prompt
from kunserve.sim.report import Answer, Record, Sample, by_answer, summarize
from kunserve.sim.traces import TraceRow, cut

SAMPLE_EVERY_S = 1.0


@dataclass(slots=True)
class _Client(Sink):
    """Whom a request's outputs go to: it notes their times and keeps no tokens."""

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
        """Nothing."""


class Simulation:
    """One run. `rows`: what arrives when; outputs are exactly as long as a row says."""

    def __init__(
        self,
        machine: SimMachine,
        model: ModelConfig,
        config: EngineConfig,
        rows: Sequence[TraceRow],
        max_model_len: int,
    ) -> None:
        self._machine, self._model = machine, model
        self._config = config
        self._rows, self._max_model_len = rows, max_model_len
        self.record = Record()
        self._stage_seconds: dict[int, tuple[float, float]] = {}  # of each chain: with work, and with work anywhere

    def run(self) -> dict[str, Any]:
        """Simulate to the last answer; the report."""
        return simulate(self._run())

    async def _run(self) -> dict[str, Any]:
        engine, control = await assemble(
            self._machine,
            self._model,
            self._config,
            "simulated",
            self._max_model_len,
            NoWeights,
            None,
            lookahead=self._lookahead(),
            metrics=_QuietMetrics,
        )
        await engine.start()
        sampling = asyncio.create_task(self._sample(engine))
        await self._send(engine)
        self.record.elapsed_s = loop_time()
        sampling.cancel()
        engine.check()
        await engine.stop()
        self._machine.close()
        return self._report(engine, control)

    def _lookahead(self) -> Lookahead | None:
        """As at launch, with the constants that the devices have."""
        if self._config.microbatching != "lookahead":
            return None
        return Lookahead(self._machine.cost, self._model.num_layers, self._config.num_batched_tokens)

    async def _send(self, engine: Engine) -> None:
        """Submit every row at its time, and return when all are answered."""
        loop, start_s, num_open, last_ended = asyncio.get_running_loop(), loop_time(), 0, asyncio.Event()

        def end() -> None:
            nonlocal num_open
            num_open -= 1
            last_ended.set()

        for i, row in enumerate(self._rows):
            if (delay_s := start_s + row.at_s - loop_time()) > 0:
                await asyncio.sleep(delay_s)
            row = cut(row, engine.limits.max_model_len)
            answer = Answer(loop_time(), row.num_prompt_tokens)
            client = _Client(answer, loop, end)
            self.record.answers.append(answer)
            token_ids, keys = self._prompt(row, i, row.num_prompt_tokens)
            request = Request(f"{i}", token_ids, SamplingParams(row.num_output_tokens, ignore_eos=True, seed=0))
            request.block_keys = keys
            try:
                engine.submit_to(request, client)
            except KunServeError as error:
                answer.failure = error.message
            else:
                num_open += 1
        while num_open:
            last_ended.clear()
            await last_ended.wait()

    def _prompt(self, row: TraceRow, number: int, num_tokens: int) -> tuple[list[int], list[bytes]]:
        """Return token ids and, if anybody looks for them, keys of full blocks."""
        if not self._config.enable_prefix_caching:
            return [ANY_TOKEN] * num_tokens, []
        return make_prompt(row, number, num_tokens, self._config.block_size)

    async def _sample(self, engine: Engine) -> None:
        while True:
            groups = engine.groups
            self.record.samples.append(
                Sample(
                    loop_time(),
                    sum(group.num_blocks for group in groups),
                    sum(group.num_used for group in groups),
                    engine.scheduler.num_waiting,
                    engine.num_running,
                    len(groups),
                    engine.metrics.num_generation_tokens,
                )
            )
            for group in groups:
                if len(group.stages) > 1:
                    active_s = group.occupancy.active_s(loop_time()) * len(group.stages)
                    self._stage_seconds[group.group_id] = sum(group.occupancy.busy_s(loop_time())), active_s
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _report(self, engine: Engine, control: OverloadControl) -> dict[str, Any]:
        transitions = control.state()["transitions"]
        for transition in transitions:
            del transition["weight_sources"]  # there are no bytes that could come from anywhere
        busy_s, active_s = (sum(seconds) for seconds in zip((0.0, 0.0), *self._stage_seconds.values(), strict=True))
        cache = {}
        if self._config.enable_prefix_caching:
            cache["prefix_hit_rate"] = round(engine.metrics.prefix_hit_rate, 4)  # of all prompt tokens
        return (
            summarize(self.record, self._config.block_size)
            | cache
            | {
                "preemptions": engine.scheduler.num_preemptions,
                "swaps": engine.scheduler.swapped.num_swaps,
                "migrations": engine.scheduler.num_migrations,
                "bubble_share": round(1 - busy_s / active_s, 4) if active_s else None,  # of all chains
                "num_transitions": len(transitions),
                "transitions": transitions,
                "answers": by_answer(self.record),
            }
        )
