"""Publishing: every request gets what its token of a step says, and those for which it is the last are finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

from kunserve.compute.sampler import SampledToken
from kunserve.engine.batch import Microbatch, count_prompt_tokens
from kunserve.engine.fleet import Fleet
from kunserve.engine.group import Group
from kunserve.engine.request import Output, Request
from kunserve.engine.signals import loop_time
from kunserve.engine.step.results import Result, Results
from kunserve.engine.text.live import Live
from kunserve.observe.metrics import Metrics
from kunserve.sampling import FinishReason


class Publisher:
    """Hands out what steps brought. Used on the event loop."""

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        live: Mapping[str, Live],
        eos_token_ids: tuple[int, ...],
        finish: Callable[[Live, FinishReason, Output], None],
        fail: Callable[[Live, BaseException], None],
    ) -> None:
        """Publish to those who are `live`. `finish` ends one with its last output, `fail` with what went wrong."""
        self._fleet, self._metrics, self._live, self._eos_token_ids = fleet, metrics, live, eos_token_ids
        self._finish, self._fail = finish, fail
        # Who decoded in a group's last step: the scheduler names them by the same list while they stay the same.
        self._decoding = WeakKeyDictionary[Group, tuple[Sequence[Request], Sequence[Live | None]]]()

    def publish(self, group: Group, batch: Microbatch, results: Results) -> None:
        """Send every request what its token says; finish those for which it is the last."""
        self._metrics.step(batch.num_tokens)
        self._metrics.prompt_tokens(count_prompt_tokens(batch))
        if group.on_first_commit is not None:
            group.on_first_commit()
            group.on_first_commit = None
        now_s, gaps_s, num_first = loop_time(), list[float](), 0
        self._go_on(group, batch, results, now_s, gaps_s)
        for result in results.others:
            if (live := self._arrived(group, result)) is not None and result.token is not None:
                if (gap_s := live.came(now_s)) is not None:
                    gaps_s.append(gap_s)
                else:
                    num_first += 1
                    self._metrics.first_token(live.request, now_s)
                self._take(live, result.token)
        self._metrics.generation_tokens(num_first + len(gaps_s))
        self._metrics.inter_tokens(gaps_s)

    def _go_on(self, group: Group, batch: Microbatch, results: Results, now_s: float, gaps_s: list[float]) -> None:
        """Publish the tokens of those who decode, whose first one came before: what runs for each row of each step."""
        due, eos_token_ids = self._fleet.due(batch.decoding, group), self._eos_token_ids
        for live, token in zip(self._those(group, batch.decoding.requests), results.decoding, strict=True):
            if live is None or (request := live.request).finish_reason is not None or request.has_failed:
                continue  # nobody wants it
            if due and request in due:
                self._fleet.computed(request, group)
            token_id, _, error = token
            if error is not None:
                self._fleet.distrust(request, group)
                self._fail(live, error)
                continue
            gaps_s.append(now_s - live.last_token_s)
            live.last_token_s = now_s
            try:
                text = live.say(token_id, eos_token_ids) if live.is_simple else None
            except KeyboardInterrupt:
                raise
            except BaseException as fault:  # a panic in Rust code, of a tokenizer, is no Exception
                self._fail(live, fault)
                continue
            if text is None:
                self._take(live, token)
            else:
                live.stream.put_token(text, token_id)

    def _those(self, group: Group, requests: Sequence[Request]) -> Sequence[Live | None]:
        """Return the ways out of requests that decode; None of one that has ended. Nearly always the same as before."""
        known, lives = self._decoding.get(group, (None, ()))
        if known is not requests:
            lives = [self._live[r.request_id] if r.finish_reason is None else None for r in requests]
            self._decoding[group] = requests, lives
        return lives

    def _arrived(self, group: Group, result: Result) -> Live | None:
        """Note what a step has computed of one request; returns its way out, None if it has ended."""
        request = result.request
        if request.is_over_here:
            return None
        if result.scored:
            result.add_prompt_logprobs()
        self._fleet.computed(request, group)
        live = self._live[request.request_id]
        if result.error is None:
            return live
        self._fleet.distrust(request, group)
        self._fail(live, result.error)
        return None

    def _take(self, live: Live, token: SampledToken) -> None:
        """Publish a token that may end its request, or of which more is asked than its text."""
        try:
            said = live.take(token, self._eos_token_ids)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in Rust code, of a tokenizer or a grammar, is no Exception
            self._fail(live, error)
            return
        if said.finish_reason is None:
            live.stream.put(said)
        else:
            self._finish(live, said.finish_reason, said)
