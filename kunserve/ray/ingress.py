"""What Ray runs before the replicas: the front, and the way from it to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import ray
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from kunserve.ray.front import Front, ReplicaGoneError
from kunserve.ray.lease import Lease
from kunserve.ray.upstream import Head, Headers, answer_of


class RayReplicas:
    """The replicas of one deployment of `Replica`, found by its request router. Implements `front.Replicas`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        """Ask the replicas of the deployment that has this handle."""
        self._handle = handle.options(stream=True)
        self._node = ray.get_runtime_context().get_node_id()
        self._ending: set[asyncio.Task[None]] = set()

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> AsyncGenerator[Head | bytes, None]:
        """See `front.Replicas`."""
        parts, is_over = self._handle.answer.remote(method, path, headers, body, self._node), False
        try:
            async for part in parts:
                if not isinstance(part, Lease):
                    yield part
                    continue
                direct = answer_of(part.server, method, path, headers, body)
                async with part.held(), aclosing(direct):
                    async for piece in direct:
                        yield piece
                is_over = True
                return
        except (RayError, RuntimeError, OSError) as error:
            raise ReplicaGoneError(f"{type(error).__name__}: {error}") from error
        finally:
            if is_over:  # the replica will see that the lease has ended; the client need not wait for that
                self._end(parts)
            else:
                parts.cancel()  # no effect on one that has ended

    def _end(self, parts: DeploymentResponseGenerator) -> None:
        """Let a call come to its end in the background."""
        task = asyncio.create_task(_exhaust(parts))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _exhaust(parts: DeploymentResponseGenerator) -> None:
    with contextlib.suppress(RayError, RuntimeError):  # the replica has died: its answer had come to the end
        async for _ in parts:
            pass


class Ingress:
    """The front's deployment: `serve.ingress()` serves the application that it builds."""

    def __init__(self, models: Mapping[str, DeploymentHandle], key: str) -> None:
        """Serve `models`: handles by the names that requests give. `key`: a front's, which the replicas know."""
        known: dict[str, RayReplicas] = {}
        for handle in models.values():
            known.setdefault(handle.deployment_name, RayReplicas(handle))
        self._front = Front({name: known[handle.deployment_name] for name, handle in models.items()}, key)

    def counts(self) -> dict[str, int]:
        """Return how often this front has sent a request again, and let another replica go on with a stream."""
        return {"repeated": self._front.num_repeated, "resumed": self._front.num_resumed}

    def __serve_build_asgi_app__(self) -> Front:
        """Return the application; Serve calls this."""
        return self._front
