"""Serve's request router: to a replica that has seen the beginning of the body, unless others have much less to do."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from kunserve.ray.prefixes import Prefixes, keys_of, ranked
from kunserve.ray.replica import WAITING


class PrefixRouter(FIFOMixin, RequestRouter):
    """See the module. Each front has one, and knows what it sent itself."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin with nothing known; Serve calls this."""
        self._prefixes = Prefixes()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in the order in which they are tried."""
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        keys = [] if pending_request is None else keys_of(_body_of(pending_request))
        loads = {replica_id: self._load(replica) for replica_id, replica in replicas.items()}
        return [[replicas[replica_id]] for replica_id in ranked(loads, self._prefixes.shares(keys))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Note where a body went."""
        self._prefixes.went(keys_of(_body_of(pending_request)), replica_id)

    def _load(self, replica: RunningReplica) -> float:
        """Return how many requests a replica has: those that Serve counts, and those that wait in it once more."""
        num_ongoing = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return float(num_ongoing + replica.routing_stats.get(WAITING, 0.0))


def _body_of(pending: PendingRequest) -> bytes:
    """Return the body of a request to `Replica.answer`; nothing of another call."""
    body = pending.args[3] if len(pending.args) == 5 else b""
    return body if isinstance(body, bytes) else b""
