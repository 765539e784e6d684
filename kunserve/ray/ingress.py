"""What Ray runs before the replicas: the front, and the way from it to them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from kunserve.ray.front import Front, Headers, ReplicaGoneError
from kunserve.ray.server_process import Head


class RayReplicas:
    """The replicas of one deployment of `Replica`, found by its request router. Implements `front.Replicas`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        """`handle`: of the deployment."""
        self._handle = handle.options(stream=True)

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> AsyncGenerator[Head | bytes, None]:
        """See `front.Replicas`."""
        parts = self._handle.answer.remote(method, path, headers, body)
        try:
            async for part in parts:
                yield part
        except (RayError, RuntimeError) as error:  # the replica's, or of an answer that its server has not ended
            raise ReplicaGoneError(f"{type(error).__name__}: {error}") from error
        finally:
            parts.cancel()  # no effect on one that has ended


class Ingress:
    """The front's deployment: `serve.ingress()` serves the application that it builds."""

    def __init__(self, models: Mapping[str, DeploymentHandle], key: str) -> None:
        """`models`: handles by the names that requests give. `key`: a front's, which the replicas know."""
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
