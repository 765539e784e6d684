"""Retries: requests whose step failed start over from their tokens, elsewhere if possible, and nobody is told.

A step is one piece of work for many requests, and its error does not say whose fault it is. So those that it failed
with are suspected: each goes alone (scheduler.py) until it has passed where it failed. One that fails alone again and
again is given up. A group in which step after step fails gets no requests while there are others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from kunserve.engine.batch import Microbatch
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.engine.schedule.scheduler import Scheduler
from kunserve.engine.step.executor import StepError
from kunserve.engine.survive.health import Health
from kunserve.errors import EngineError
from kunserve.gpu.refusal import log_failure
from kunserve.observe.metrics import Metrics

MOST_FAILURES = 5  # of a request alone, at the same token: then it is given up
SUSPECT_AFTER = 2  # steps of a group that failed, one after the other
PROBE_S = 10.0  # after which a suspected group gets requests again


class Retries:
    """Decides what becomes of failed steps. Used on the event loop."""

    def __init__(self, fleet: Fleet, scheduler: Scheduler, health: Health, metrics: Metrics) -> None:
        self._fleet, self._scheduler, self._health, self._metrics = fleet, scheduler, health, metrics
        self._num_failed = Counter[int]()  # steps in a row, by group id

    def failed(self, group: Group, batch: Microbatch, error: Exception) -> list[tuple[Request, EngineError]]:
        """Let the requests of a microbatch that came back with an error start over; returns those that shall not.

        A request starts over when no other microbatch carries it: see `came_back`.
        """
        failure = error if isinstance(error, StepError) else StepError(error, None)
        if not group.is_lost:  # else all is said
            log_failure("step failed", failure.error, group=group.group_id, requests=len(batch.requests))
            self._num_failed[group.group_id] += 1
            if self._num_failed[group.group_id] >= SUSPECT_AFTER:
                devices = [stage.device for stage in group.stages]
                self._suspect(group, devices if failure.device is None else [failure.device])
        # Where step after step fails, one more says nothing of its request: unless it is so everywhere.
        is_the_groups_fault = group.is_suspect and not all(g.is_suspect for g in self._fleet.groups)
        is_to_blame = len(batch.requests) == 1 and not (is_the_groups_fault or group.is_lost)
        has_faulted = self._health.take_fault(stage.device for stage in group.stages)
        # Who was there when a device ended before, and is the only one of those now, is to blame: the others are not.
        again = [request for request in batch.requests if has_faulted and request.num_killed]
        killer = again[0] if len(again) == 1 else None
        given_up = list[tuple[Request, EngineError]]()
        for request, _, end, _, _ in batch.spans:
            if request.finish_reason is not None or request.has_failed:
                continue
            request.num_failures += is_to_blame
            if request.num_failures == MOST_FAILURES or request is killer:
                given_up.append((request, failure))
                continue
            request.has_failed = True
            if (has_faulted and killer is None) or not group.is_lost:
                request.num_killed += has_faulted
                request.avoids, request.suspect_until = group.group_id, max(request.suspect_until, end)
            if request.constraint is not None:
                request.constraint.release()
        self._start_over(group, batch)
        return given_up

    def came_back(self, group: Group, batch: Microbatch) -> None:
        """Note that a microbatch came back without an error."""
        # Who has failed already is in this one because it ran behind: over KV that is not there, which shows nothing.
        requests, num_failed = batch.requests, 0
        for request in requests:
            if request.has_failed:
                num_failed += 1
            elif request.suspect_until and request.suspect_until <= request.num_computed_tokens:  # it has come further
                request.num_failures = request.num_killed = request.suspect_until = 0
                request.avoids = None
        if num_failed < len(requests):
            self._num_failed.pop(group.group_id, None)
        if num_failed:
            self._start_over(group, batch)

    def _start_over(self, group: Group, batch: Microbatch) -> None:
        for request in [r for r in reversed(batch.requests) if r.has_failed]:  # the first is back first
            if request.finish_reason is None and request.num_in_flight == 0:
                request.has_failed = False
                self._fleet.resume(request)  # a migration that has stopped it sees that it is gone
                self._scheduler.preempt(group, request, is_hurried=group.is_lost)
                self._metrics.retried_request()

    def _suspect(self, group: Group, devices: Sequence[int]) -> None:
        """Give a group no requests for a while."""
        if self._health.fails(devices):
            asyncio.get_running_loop().call_later(PROBE_S, self._trust, group, devices)

    def _trust(self, group: Group, devices: Sequence[int]) -> None:
        """Try a group again: one more failure is enough."""
        self._num_failed[group.group_id] = SUSPECT_AFTER - 1
        self._health.trust(devices)
