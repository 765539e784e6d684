"""Several machines behind Ray Serve: `serve run kunserve.ray:app model=smollm2-135m` (extra `ray`).

One replica is one KunServe server: a process of its own on a Unix socket, with the GPUs that Ray gives to the replica.
Bodies pass to it as they came, and its answers come back as they are written. A front before the replicas finds one by
the prefix of a request and by load, and goes on elsewhere with streams whose replica is gone.

| module | what it is |
| --- | --- |
| `application` | the arguments of an application, and the deployments they make |
| `front` | the ASGI application: to a replica and back, again elsewhere if need be; knows nothing of Ray |
| `broken` | a stream as far as it came: what its client has, and what a resumed one begins with |
| `ingress`, `replica` | what Ray runs: the front's deployment, and a server's |
| `lease` | lets a front on the same machine speak to the server's socket itself |
| `server_process` | a replica's server: start, look after, end |
| `upstream` | a request to a server's socket, and its answer as it comes |
| `router`, `prefixes` | which replica a request goes to |
| `scaling` | how many replicas there are: by demand over undropped capacity |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: Mapping[str, Any]) -> Application:
    """Return the application that `args` describe (`application.Arguments`). Raises ConfigError."""
    from kunserve.ray.application import build  # needs the extra `ray`; the front itself does not

    return build(args)
