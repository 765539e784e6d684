"""What `--kv-events-config` asks for: routers are told which prefixes this server has, as vLLM tells them.

The fields and their defaults are vLLM's (`vllm/config/kv_events.py`). Nothing here needs the extra `kv-events`; what
publishes (kv_publisher.py) does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from kunserve.errors import ConfigError

FLAG = "--kv-events-config"
PACKAGES = ("zmq", "msgspec")  # as they are imported
TYPES: Mapping[str, type | tuple[type, ...]] = {"bool": bool, "str": str, "int": int, "str | None": (str, type(None))}


@dataclass(frozen=True, slots=True)
class KVEventsConfig:
    """Where events go. An endpoint with `*` or `::`, and one of `ipc`, is bound; any other is connected to."""

    enable_kv_cache_events: bool = False
    publisher: str | None = None  # zmq or null; None: zmq, if events are enabled
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None  # bound: subscribers that missed batches ask here
    buffer_steps: int = 10_000  # batches that are kept for them
    hwm: int = 100_000  # batches that wait for a slow subscriber; more are lost to it
    max_queue_size: int = 100_000  # of vLLM's: batches are sent at once here, none queue
    topic: str = ""


def kv_events_config(values: Mapping[str, Any]) -> KVEventsConfig | None:
    """Return the flag's value, checked; None if nobody is to be told. ConfigError if it cannot be."""
    known = {field.name: str(field.type) for field in fields(KVEventsConfig)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{FLAG}: there is no {name!r}, but {', '.join(known)}")
        is_right = isinstance(value, TYPES[known[name]]) and (known[name] == "bool" or not isinstance(value, bool))
        if not is_right or (known[name] == "int" and value < 1):
            raise ConfigError(f"{FLAG}: {name} must be {_wanted(known[name])}, not {value!r}")
    config = KVEventsConfig(**values)
    if config.publisher not in (None, "zmq", "null"):
        raise ConfigError(f"{FLAG}: publisher must be zmq or null, not {config.publisher!r}")
    if not config.enable_kv_cache_events or config.publisher == "null":
        return None
    if any(find_spec(package) is None for package in PACKAGES):
        raise ConfigError(f"{FLAG} needs pyzmq and msgspec: pip install 'kunserve[kv-events]'")
    return config


def _wanted(kind: str) -> str:
    return {"bool": "true or false", "int": "a number of at least 1"}.get(kind, "a string")
