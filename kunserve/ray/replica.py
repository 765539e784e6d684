"""What Ray runs as a replica: one server, its health, its load; requests pass through to it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import ray

from kunserve.ray.lease import Lease, Leases
from kunserve.ray.scaling import DEMAND
from kunserve.ray.server_process import ServerProcess
from kunserve.ray.upstream import Head, answer_of

WAITING, RUNNING = "num_waiting", "num_running"
_LOADS = {"vllm:num_requests_waiting": WAITING, "vllm:num_requests_running": RUNNING}
_DEMANDS = {"kunserve:demand_over_undropped": DEMAND}


class Replica:
    """A deployment of KunServe servers; see `ServerProcess`. Its methods are those that Serve looks for."""

    async def __init__(self, flags: Sequence[str], front_key: str) -> None:  # type: ignore[misc]  # as Serve allows
        """Start the server and wait until it is ready. RuntimeError if it ends before."""
        self._server = ServerProcess(flags, front_key)
        await self._server.start()
        self._leases = Leases(self._server.socket.with_name("leases"), self._server.socket)
        await self._leases.open()
        self._node = ray.get_runtime_context().get_node_id()

    async def answer(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes, node: str
    ) -> AsyncIterator[Head | bytes | Lease]:
        """Yield an answer of the server (see `answer_of`); to a front on this `node` a lease, and it asks itself.

        The request counts as running here until the front lets go: Serve waits for it before the replica goes.
        """
        if node == self._node:
            async for lease in self._leases.give():
                yield lease
            return
        async with aclosing(answer_of(str(self._server.socket), method, path, headers, body)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """Raise RuntimeError if the server makes no progress: then Serve replaces the replica."""
        status = await self._server.status_of("/health")
        if status != 200:
            raise RuntimeError(f"the server answers {status} to /health")

    async def record_routing_stats(self) -> dict[str, float]:
        """Return how many requests wait and run, for `router`."""
        return await self._server.gauges(_LOADS)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the demand over undropped capacity, for `scaling`."""
        return await self._server.gauges(_DEMANDS)

    async def pids(self) -> tuple[int, int]:
        """Return the process ids of the replica and of its server."""
        return os.getpid(), self._server.pid

    async def socket(self) -> str:
        """Return the path of the server's socket, for who is on this machine."""
        return str(self._server.socket)

    async def __del__(self) -> None:
        """End the server. Serve calls this when the replica's requests have ended."""
        await self._leases.close()
        await self._server.stop()
