"""The server's own steps: some of every kind are kept, and the cost model's constants follow what they took.

What devices take is known where they work (`Passage.stage_s`), and only asked for where a step is to be kept: of a long
decode that is ever more seldom. The fit runs beside the loop (planner/cost_fit.py); whether it is time for one is
looked at when a step that was kept comes back, so that nothing polls.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from kunserve.engine.batch import Microbatch, work_of
from kunserve.engine.group import Group
from kunserve.engine.signals import loop_time
from kunserve.planner.cost import Work
from kunserve.planner.cost_fit import Measurement, adapt
from kunserve.planner.microbatch import Lookahead

log = structlog.get_logger()

MOST_KINDS, OF_A_KIND = 48, 8  # kept microbatches; the kind that came last longest ago is forgotten first
FIT_S, LEAST_NEW = 30.0, 64  # a fit comes no sooner than so long, and so many kept microbatches, after the last one

Kind = tuple[int, int, int]  # number of stages; powers of two of its requests, of the tokens of the last of them


@dataclass(slots=True)
class _Kept:
    """Microbatches of one kind, drawn evenly from those since the last fit; what is older makes way for them."""

    microbatches: list[tuple[Measurement, ...]] = field(default_factory=list)
    num_seen: int = 0


class OwnSteps:
    """Keeps steps that were measured, and fits the constants of `lookahead` to them. Used on the event loop.

    `shares_head`: both ends of a chain compute the head, each for a part of the vocabulary (`DeviceExecutor`).
    """

    def __init__(self, lookahead: Lookahead, *, shares_head: bool, fit_s: float = FIT_S) -> None:
        self._lookahead, self._shares_head, self._fit_s = lookahead, shares_head, fit_s
        self._first_source = lookahead.source
        self._kinds = OrderedDict[Kind, _Kept]()
        self._random = random.Random(0)
        self._num_new, self._next_fit_s = 0, loop_time() + fit_s

    def __len__(self) -> int:
        return sum(len(kept.microbatches) for kept in self._kinds.values())

    def place(self, group: Group, batch: Microbatch) -> list[float] | None:
        """Return where the executor adds up the seconds of each stage, for `keep`; None if this one is not kept."""
        kind = _kind(group, batch)
        if (kept := self._kinds.get(kind)) is None:
            kept = self._kinds[kind] = _Kept()
            if len(self._kinds) > MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(kind)
        kept.num_seen += 1
        if self._random.random() * kept.num_seen >= OF_A_KIND:
            return None
        return [0.0] * len(group.stages)

    def keep(self, group: Group, batch: Microbatch, stage_s: Sequence[float]) -> bool:
        """Keep a microbatch that has come back, and return whether it is time to `fit`."""
        kept = self._kinds.get(_kind(group, batch))
        if kept is None or not all(stage_s):  # forgotten meanwhile; or an executor that does not say
            return False
        measured = tuple(_measured(group, work_of(batch), stage_s, shares_head=self._shares_head))
        if len(kept.microbatches) < OF_A_KIND:
            kept.microbatches.append(measured)
        else:
            kept.microbatches[self._random.randrange(OF_A_KIND)] = measured
        self._num_new += 1
        return self._num_new >= LEAST_NEW and loop_time() >= self._next_fit_s

    async def fit(self) -> None:
        """Fit constants beside the loop, and let those who predict use them if they are clearly better."""
        self._next_fit_s = math.inf  # until this is done
        steps = [microbatch for kept in self._kinds.values() for microbatch in kept.microbatches]
        try:
            adapted = await asyncio.to_thread(adapt, self._lookahead.cost, steps)
        except Exception:  # whatever is wrong with the numbers, the server goes on with the constants that it has
            log.exception("constants could not be fitted to own steps")
            adapted = None
        if adapted is not None:
            self._lookahead.learn(adapted.cost, f"own steps, at first {self._first_source}")
            log.info(
                "predicting steps by own ones",
                error_before=round(adapted.error_before, 3),
                error=round(adapted.error, 3),
                held_out=adapted.num_held_out,
                constants={name: float(f"{value:.3g}") for name, value in adapted.cost.to_dict().items()},
            )
        for kept in self._kinds.values():
            kept.num_seen = min(kept.num_seen, OF_A_KIND)
        self._num_new, self._next_fit_s = 0, loop_time() + self._fit_s


def _kind(group: Group, batch: Microbatch) -> Kind:
    """Return what kind of microbatch it is, without a look at all of it: who decodes comes first, prompts come last."""
    others = batch.others
    num_requests = len(batch.decoding.ends) + len(others)
    num_tokens = others[-1].end - others[-1].start if others else 1
    return len(group.stages), num_requests.bit_length(), num_tokens.bit_length()


def _measured(group: Group, work: Work, stage_s: Sequence[float], *, shares_head: bool) -> Iterator[Measurement]:
    """Yield the stages of a microbatch: the head is the last one's, or shared by both ends.

    Then these work equally long on it, with sampling (`HeadBalance`).
    """
    last = len(group.stages) - 1
    shares = {0: 0.5, last: 0.5} if shares_head and last else {last: 1.0}
    for position, (stage, seconds) in enumerate(zip(group.stages, stage_s, strict=True)):
        num_layers = stage.last_layer - stage.first_layer
        yield Measurement(num_layers, work, position == 0, shares.get(position, 0.0), seconds)
