"""What to do when blocks run out: who is admitted, and who makes room. Pure: no clock, no I/O, no torch.

The policies are those of the published engines, with their constants, so that they can be compared in one engine:
recompute (vLLM 0.32), retract (SGLang, mid-2026), swap (InferCept), migrate (Llumnix v0). `drop` acts one level
higher, in the planner; below it, when even the largest merge is not enough, KV goes to the host or is recomputed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from weakref import WeakKeyDictionary

from kunserve.engine.group import Group
from kunserve.engine.request import Request
from kunserve.engine.schedule.budget import is_schedulable
from kunserve.policies import OverloadPolicy

# SGLang: schedule_conservativeness 1.0, SGLANG_INIT_NEW_TOKEN_RATIO and its companions
INIT_NEW_TOKEN_RATIO = 0.7
MIN_NEW_TOKEN_RATIO = 0.14 * INIT_NEW_TOKEN_RATIO
NEW_TOKEN_RATIO_DECAY = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / 600  # per decode step
CLIP_MAX_NEW_TOKENS = 4096
RETRACT_DECODE_STEPS = 20
SWAP_WATERMARK = 0.01  # InferCept: share of blocks that admission leaves free
MIGRATE_THRESHOLD = 3.0  # Llumnix: remaining steps below which a replica gives requests away


class Policy(ABC):
    """Decisions at the edge of memory, for one group at a time."""

    is_requeued_last = False  # a preempted request goes to the tail of the queue, not to its head
    seeks_prefixes = True  # a group that has the first blocks of a request takes it even if it is more loaded

    @abstractmethod
    def may_admit(self, group: Group, request: Request, num_shared: int = 0) -> bool:
        """Tell whether a waiting request may join `group`, where others use `num_shared` blocks that it needs, too."""

    def least_tokens(self, request: Request) -> int:
        """Return how many tokens a group has to hold to admit `request`, however empty it is."""
        return request.num_tokens

    def make_way(self, group: Group, num_leaving: int) -> list[Request]:
        """Name who leaves before a step, so that all others get their blocks; `num_leaving` come free anyway."""
        return []

    def victim(self, group: Group, request: Request) -> Request | None:
        """Name whom to preempt so that `request` gets a block, perhaps itself; None: wait for what is in flight."""
        return None

    def num_reserved(self, group: Group) -> int:
        """Return the blocks that admission leaves free for those who run."""
        return 0

    def goes_to_host(self, group: Group, request: Request) -> bool:
        """Tell whether the KV of a request that has to make way is kept in host memory, if there is room."""
        return False

    def load(self, group: Group) -> float:
        """Return how full a group is; the least loaded that may admit a request takes it."""
        return len(group.running) / len(group.stages) + group.num_used / (group.num_blocks + 1)


def is_evictable(request: Request) -> bool:
    """Tell whether a request's blocks may be taken now: no microbatch carries it, no copy runs on it."""
    return request.num_in_flight == 0 and not request.is_moving


def is_decoding(request: Request) -> bool:
    """Tell whether only the newest token's KV is missing to a request: it is scheduled next, or in flight."""
    return request.num_output_tokens > 0 and request.num_tokens - request.num_computed_tokens == 1


def _priority(request: Request) -> int:
    return request.priority


class Recompute(Policy):
    """vLLM: the whole input must fit to be admitted; the last admitted makes room and starts over.

    `watermark`: share of the group's blocks that admission leaves free while anything runs (vLLM's `--watermark`).
    """

    def __init__(self, watermark: float = 0.0) -> None:
        self.watermark = watermark

    def may_admit(self, group: Group, request: Request, num_shared: int = 0) -> bool:
        """Admit a request whose whole input fits, above the watermark."""
        num_free = group.free_for(request.num_tokens) - self.num_reserved(group)
        return group.blocks_for(request.num_tokens) - num_shared <= num_free

    def num_reserved(self, group: Group) -> int:
        """Return the watermark's share of the blocks, while anything runs."""
        return int(self.watermark * group.num_blocks) if group.running else 0

    def victim(self, group: Group, request: Request) -> Request | None:
        """Name the tail of the last priority. Nobody on the move: it may be waiting for blocks of those that run."""
        tail = max((r for r in reversed(group.running) if not r.is_moving), key=_priority)
        return tail if is_evictable(tail) else None


class Queue(Policy):
    """Admits only what surely fits: input and every token that may still be asked for. Never preempts."""

    def may_admit(self, group: Group, request: Request, num_shared: int = 0) -> bool:
        """Admit a request if the longest that it and all others can get fits in the group."""
        return group.can_hold([self.least_tokens(r) for r in (*group.running, request)])

    def least_tokens(self, request: Request) -> int:
        """Return the prompt's tokens, and all that the request may ask for."""
        return request.num_prompt_tokens + request.params.max_tokens


class Retract(Policy):
    """SGLang: admits by an estimate of what the running will still generate, and takes it back when it was wrong.

    The estimate is a ratio of the tokens they may still ask for. It decays while all goes well, and is set anew
    from what is known when somebody had to leave: those with the fewest generated tokens, to the tail of the queue.
    """

    is_requeued_last = True

    def __init__(self) -> None:
        self._ratios: WeakKeyDictionary[Group, float] = WeakKeyDictionary()  # absent: never decoded, or idle since

    def ratio(self, group: Group) -> float:
        """Return the share of the tokens still asked for that is reserved for decoding requests."""
        return self._ratios.get(group, INIT_NEW_TOKEN_RATIO)

    def may_admit(self, group: Group, request: Request, num_shared: int = 0) -> bool:
        """Admit if input, what it may generate, and a block fit beside what is reserved; alone, the input is enough."""
        num_free = group.free_for(request.num_tokens)
        if not group.running:
            return group.blocks_for(request.num_tokens) <= num_free
        budget = (num_free + num_shared) * group.block_size - self._reserved(group)
        return request.num_tokens + _most_new_tokens(request) + group.block_size < budget

    def make_way(self, group: Group, num_leaving: int) -> list[Request]:
        """Name the last priority and the fewest generated tokens first, of equals the longest prompt; one stays.

        Called once per step.
        """
        if not group.running:
            self._ratios.pop(group, None)
            return []
        ready = [r for r in group.running if is_evictable(r) and is_decoding(r)]
        ready.sort(key=lambda r: (-r.priority, r.num_output_tokens, -r.num_prompt_tokens))
        victims = _until_fits(group, ready, num_leaving)
        if victims:
            stay = [r for r in group.running if r.num_output_tokens and r not in victims]
            self._ratios[group] = ratio_after_retraction(stay)
        elif any(map(is_decoding, group.running)):  # a chain's step is as many microbatches as it has stages
            decayed = self.ratio(group) - NEW_TOKEN_RATIO_DECAY / len(group.stages)
            self._ratios[group] = max(MIN_NEW_TOKEN_RATIO, decayed)
        return victims

    def _reserved(self, group: Group) -> float:
        """Estimate the tokens that the running will still generate; prefills count in full, as in SGLang."""
        ratio = self.ratio(group)
        return sum(_most_new_tokens(r) * (ratio if is_decoding(r) else 1.0) for r in group.running)


def _most_new_tokens(request: Request) -> int:
    return min(request.params.max_tokens - request.num_output_tokens, CLIP_MAX_NEW_TOKENS)


def ratio_after_retraction(stay: Sequence[Request]) -> float:
    """Estimate the ratio as SGLang does: what `stay` will have generated in 20 steps, over all they may generate."""
    decoded = sum(request.num_output_tokens for request in stay)
    most = sum(request.params.max_tokens for request in stay)
    return min(1.0, (decoded + RETRACT_DECODE_STEPS * len(stay)) / (most + 1))


class Swap(Recompute):
    """InferCept under memory pressure: vLLM's order, but the victims' KV goes to host memory and comes back.

    Who leaves is named before the step, because blocks come free only when their copy is done.
    """

    def make_way(self, group: Group, num_leaving: int) -> list[Request]:
        """Name those of the last priority first, from the tail of the running list; one stays."""
        if group.num_free + num_leaving >= len(group.running):  # each lacks one block at most
            return []
        evictable = (r for r in reversed(group.running) if is_evictable(r))
        return _until_fits(group, sorted(evictable, key=_priority, reverse=True), num_leaving)

    def victim(self, group: Group, request: Request) -> Request | None:
        """Name nobody: whoever has to leave is on the way."""
        return None

    def goes_to_host(self, group: Group, request: Request) -> bool:
        """Send every request's KV to the host."""
        return True


class Drop(Swap):
    """KunServe below its planner, where nothing is left to drop: victims are swapped or recomputed, as is quicker.

    `is_host_faster`: whether KV of so many tokens is sooner copied to the host and back than computed again but for the
    first ones, as many as the second number says, which others keep.
    """

    def __init__(self, watermark: float, is_host_faster: Callable[[int, int], bool]) -> None:
        super().__init__(watermark)
        self._is_host_faster = is_host_faster

    def victim(self, group: Group, request: Request) -> Request | None:
        """Name whom vLLM names: `make_way` counts on a block for each, and KV that has moved here may lack more."""
        return Recompute.victim(self, group, request)

    def goes_to_host(self, group: Group, request: Request) -> bool:
        """Send a request's KV to the host where a copy there and back is faster.

        Blocks that others hold stay where they are: whoever starts over finds them, while all KV goes to the host, and
        shares none when it comes back.
        """
        num_kept = (request.num_blocks - request.num_own_blocks) * group.block_size
        return self._is_host_faster(request.num_computed_tokens, num_kept)


class Migrate(Recompute):
    """Llumnix: vLLM in every replica, dispatch to the replica with most remaining steps, and live migration.

    Llumnix also migrates queued requests. Here the queue is global and a request is bound to a group only when it is
    admitted: strictly better than moving it once it has been bound to the wrong one.
    """

    seeks_prefixes = False  # Llumnix dispatches by freeness alone

    def load(self, group: Group) -> float:
        """Return more load for fewer remaining steps. What waits is nobody's yet."""
        return -remaining_steps(group.num_free, len(group.running))


def remaining_steps(num_free: float, num_running: int, waiting_blocks: float = 0.0, num_waiting: float = 0.0) -> float:
    """Return Llumnix's freeness: blocks that are left for each request, after those that wait have got theirs."""
    num_requests = num_running + num_waiting
    return (num_free - waiting_blocks) / num_requests if num_requests else inf


@dataclass(frozen=True, slots=True)
class Freeness:
    """One group when Llumnix looks for pairs. `num_killed`: requests it preempted that still wait."""

    group_id: int
    remaining_steps: float
    num_killed: int


def pair_groups(groups: Iterable[Freeness], threshold: float = MIGRATE_THRESHOLD) -> list[tuple[int, int]]:
    """Pair groups as (source, destination) ids: the most loaded with the least loaded, the next with the next."""
    by_load = sorted(groups, key=lambda g: (g.remaining_steps, g.group_id))
    sources = [g.group_id for g in by_load if g.num_killed or g.remaining_steps < threshold]
    free = [g.group_id for g in reversed(by_load) if not g.num_killed and g.remaining_steps > threshold]
    return list(zip(sources, free, strict=False))


def shortest_running(group: Group) -> Request | None:
    """Return whom Llumnix migrates: of the decoding requests the one with the fewest tokens."""
    decoding = (r for r in group.running if is_decoding(r) and is_schedulable(r))
    return min(decoding, key=lambda r: r.num_tokens, default=None)


def _until_fits(group: Group, candidates: Sequence[Request], num_leaving: int) -> list[Request]:
    """Return the first candidates, as few as let all others have blocks for their next tokens; the last one stays."""
    short = sum(group.missing_blocks(r, r.num_tokens) for r in candidates) - group.num_free - num_leaving
    victims = []
    for request in candidates[:-1]:
        if short <= 0:
            break
        victims.append(request)
        short -= group.missing_blocks(request, request.num_tokens) + request.num_own_blocks
    return victims


def make_policy(
    policy: OverloadPolicy,
    watermark: float,
    is_host_faster: Callable[[int, int], bool] = lambda num_tokens, num_kept: True,
) -> Policy:
    """Return the policy that a flag names. `watermark` as in `Recompute`; 0: the published engine's default.

    `is_host_faster` as in `Drop`.
    """
    match policy:
        case OverloadPolicy.QUEUE:
            return Queue()
        case OverloadPolicy.RETRACT:
            return Retract()
        case OverloadPolicy.SWAP:
            return Swap(watermark or SWAP_WATERMARK)
        case OverloadPolicy.MIGRATE:
            return Migrate(watermark)
        case OverloadPolicy.DROP:
            return Drop(watermark or SWAP_WATERMARK, is_host_faster)
        case OverloadPolicy.RECOMPUTE:
            return Recompute(watermark)
