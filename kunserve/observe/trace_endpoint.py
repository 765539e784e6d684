"""Where traces go: the flag for it, judged before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import urlsplit

from kunserve.errors import ConfigError

FLAG = "--otlp-traces-endpoint"
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PATH = "/v1/traces"  # of a collector that takes OTLP over HTTP


@dataclass(frozen=True, slots=True)
class TraceEndpoint:
    """A collector of OpenTelemetry's, and how it is spoken to."""

    url: str
    is_grpc: bool


def trace_endpoint(url: str | None, environment: Mapping[str, str] = os.environ) -> TraceEndpoint | None:
    """Return what the flag and OpenTelemetry's own variables say; None without the flag.

    HTTP unless `grpc://` or the variable asks for gRPC. Raises ConfigError for no URL, and if a package is missing.
    """
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "grpc") or not parts.hostname:
        raise ConfigError(f"{FLAG} {url}: must be a URL like http://collector:4318{PATH} or grpc://collector:4317")
    protocol = next((environment[name] for name in PROTOCOL_VARIABLES if environment.get(name)), "http/protobuf")
    if protocol not in ("http/protobuf", "grpc"):
        raise ConfigError(f"{PROTOCOL_VARIABLES[0]}={protocol}: must be http/protobuf or grpc")
    is_grpc = parts.scheme == "grpc" or protocol == "grpc"
    exporter = f"opentelemetry.exporter.otlp.proto.{'grpc' if is_grpc else 'http'}"
    if not _is_installed("opentelemetry.sdk") or not (_is_installed(exporter) or is_grpc):
        raise ConfigError(f"{FLAG} needs OpenTelemetry's SDK: pip install 'kunserve[otel]'")
    if is_grpc and not _is_installed(exporter):
        raise ConfigError(f"{FLAG} {url}: gRPC needs: pip install opentelemetry-exporter-otlp-proto-grpc")
    if not is_grpc and parts.path in ("", "/"):
        url = parts._replace(path=PATH).geturl()
    return TraceEndpoint(url, is_grpc)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
