"""Flags around the engine, in the names vLLM's users know: who may come in, how to listen, what to log.

Also reads them from a file (`--config`), and as vLLM's parser reads them (`--max_model_len 32k`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from kunserve.api.say.calls.formats import TOOL_FORMATS
from kunserve.api.say.reasoning import REASONING_FORMATS
from kunserve.command.command_line import OneLineParser
from kunserve.errors import ConfigError
from kunserve.observe.kv_events import KVEventsConfig, kv_events_config
from kunserve.observe.trace_endpoint import TraceEndpoint, trace_endpoint
from kunserve.sizes import parse_size

API_KEY_VARIABLES = ("KUNSERVE_API_KEY", "VLLM_API_KEY")
ADMIN_KEY_VARIABLE, FRONT_KEY_VARIABLE = "KUNSERVE_ADMIN_KEY", "KUNSERVE_FRONT_KEY"
LOG_LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"
LEAST_BODY_MEMORY_BYTES = 1 << 20
MAX_WORKERS = 64
LOG_LEVELS = ("debug", "info", "warning", "error")
STATS_INTERVAL_VARIABLES = ("KUNSERVE_LOG_STATS_INTERVAL", "VLLM_LOG_STATS_INTERVAL")

NO_FORMAT = "none"  # of tool calls, of reasoning: they are text

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}
_REPEATED = ("--api-key", "--admin-key", "--front-key")


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """What the process does around the engine, besides listening on host and port."""

    api_keys: tuple[str, ...]
    admin_keys: tuple[str, ...]
    front_keys: tuple[str, ...]
    max_num_queued_tokens: int
    max_body_memory_bytes: int
    max_response_bytes: int
    response_file: Path | None
    shares_prefixes: bool
    uses_priority: bool
    uds: Path | None
    ssl_keyfile: Path | None
    ssl_certfile: Path | None
    allowed_origins: tuple[str, ...]
    logs_access: bool
    stats_interval_s: float | None  # None: no summary line
    chat_template: Path | None
    generation_config: str  # auto: the model's own; vllm: none; else a folder that has one
    sampling: Mapping[str, Any]  # overrides the settings of `generation_config`
    tool_call_parser: str | None
    reasoning_parser: str | None
    closes_objects: bool
    chat_template_kwargs: Mapping[str, Any]  # of requests that bring none
    kv_events: KVEventsConfig | None  # None: nobody is told what the prefix cache has
    traces: TraceEndpoint | None  # None: nothing is traced
    num_workers: int  # processes for HTTP and text; 0: they are in the engine's
    ignored: Mapping[str, str]  # flags of vLLM's that change nothing -> why

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return TLS with the certificate that was given, if one was. Raises ConfigError if it cannot be used."""
        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise ConfigError("--ssl-keyfile needs --ssl-certfile")
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot use the certificate {self.ssl_certfile}: {error}") from None
        return context


def add_request_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for what a request gets that does not say."""
    add = group.add_argument
    add(
        "--generation-config",
        default="auto",
        metavar="auto|vllm|FOLDER",
        help="where sampling settings come from that a request leaves out: auto: generation_config.json or card of the "
        "model; vllm: none; or a folder that has the file",
    )
    add(
        "--override-generation-config",
        type=_object,
        default={},
        metavar="JSON",
        help='sampling settings that override these (default: none), for instance {"temperature": 0.5}',
    )
    add("--chat-template", type=Path, metavar="FILE", help="Jinja file to use instead of the model's own chat template")
    add(
        "--default-chat-template-kwargs",
        type=_object,
        default={},
        metavar="JSON",
        help="arguments of the chat template that a request leaves out (default: none), for instance "
        '{"enable_thinking": false}',
    )
    add(
        "--tool-call-parser",
        choices=(*TOOL_FORMATS, NO_FORMAT),
        help="how the model writes tool calls (default: as its template does)",
    )
    add(
        "--reasoning-parser",
        choices=(*REASONING_FORMATS, NO_FORMAT),
        help="how the model writes its reasoning, which is told apart from the content (default: as its template does)",
    )
    add(
        "--open-objects",
        action="store_true",
        help="objects of a schema may have properties that it does not name (default: only if it says so: "
        "small models never finish such objects)",
    )


def add_access_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for keys and browsers' origins."""
    add = group.add_argument
    add("--api-key", action="append", metavar="KEY", help="key that clients must send; may be given several times")
    add(
        "--share-prefixes",
        action="store_true",
        help="let requests of one API key find the cached prefixes of others (default: each key finds its own alone)",
    )
    add(
        "--admin-key",
        action="append",
        metavar="KEY",
        help="key that operators must send to drop, restore, burst, remove and add devices; without one nobody may",
    )
    add(
        "--front-key",
        action="append",
        metavar="KEY",
        help="key of a front before several servers, which may resume here the streams of one that is gone; without "
        "one nobody may",
    )
    add(
        "--max-body-memory",
        default="512MiB",
        metavar="SIZE",
        help="most bytes of unfinished request bodies that the server holds for all clients; it answers 503 to more",
    )
    add(
        "--max-response-memory",
        default="64MiB",
        metavar="SIZE",
        help="most bytes of responses that /v1/responses stores; the oldest make room for new ones; 0: store none",
    )
    add(
        "--response-store",
        type=_path,
        metavar="FILE",
        help="SQLite file that keeps stored responses beyond the server's life, within --max-response-memory",
    )
    add(
        "--allowed-origins",
        type=_origins,
        default=("*",),
        metavar="JSON",
        help='origins of browsers that may send requests, as a JSON list (default: ["*"])',
    )


def add_listen_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the server's socket."""
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--uds", type=_path, metavar="PATH", help="Unix socket to listen on, instead of host and port")
    add("--ssl-certfile", type=Path, metavar="FILE", help="certificate to serve https with")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="key of the certificate")
    add(
        "--api-workers",
        type=int,
        default=0,
        metavar="N",
        help="processes for HTTP and text beside that of the engine; 0: all is in one process",
    )


def add_router_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flag for what routers are told."""
    group.add_argument(
        "--kv-events-config",
        type=_object,
        default={},
        metavar="JSON",
        help="publish which prefixes are cached, for routers, as vLLM does (default: publish nothing), for instance "
        '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557", "topic": "kv@POD@MODEL"}; '
        "needs the extra kv-events",
    )


def http_config(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> HttpConfig:
    """Return the values of the flags, and keys of the environment where no flag gives one. Raises ConfigError."""
    keys = args.api_key or _keys_of(environment, API_KEY_VARIABLES)
    admin_keys = args.admin_key or _keys_of(environment, (ADMIN_KEY_VARIABLE,))
    front_keys = args.front_key or _keys_of(environment, (FRONT_KEY_VARIABLE,))
    if "" in (*keys, *admin_keys, *front_keys):
        raise ConfigError("--api-key, --admin-key and --front-key must not be empty")
    if args.default_chat_template_kwargs:
        from kunserve.api.ask.protocol import TEMPLATE_FIELDS  # with most of the API: flags are judged without

        if set_by_us := args.default_chat_template_kwargs.keys() & TEMPLATE_FIELDS:
            raise ConfigError(f"--default-chat-template-kwargs must not set {min(set_by_us)}: requests do")
    if not 0 <= args.api_workers <= MAX_WORKERS:
        raise ConfigError(f"--api-workers {args.api_workers}: must be between 0 and {MAX_WORKERS}")
    if args.api_workers and args.otlp_traces_endpoint:
        raise ConfigError("--api-workers does not go with --otlp-traces-endpoint: workers know nothing of traces")
    if args.max_num_queued_tokens < 1:
        raise ConfigError(f"--max-num-queued-tokens {args.max_num_queued_tokens}: must be at least 1")
    if (max_body_memory_bytes := parse_size(args.max_body_memory)) < LEAST_BODY_MEMORY_BYTES:
        raise ConfigError(f"--max-body-memory {args.max_body_memory}: must be at least 1MiB")
    max_response_bytes = 0 if args.max_response_memory == "0" else parse_size(args.max_response_memory)
    if args.response_store is not None and max_response_bytes == 0:
        raise ConfigError("--response-store needs a --max-response-memory above 0, which bounds the file, too")
    return HttpConfig(
        api_keys=tuple(keys),
        admin_keys=tuple(admin_keys),
        front_keys=tuple(front_keys),
        max_num_queued_tokens=args.max_num_queued_tokens,
        max_body_memory_bytes=max_body_memory_bytes,
        max_response_bytes=max_response_bytes,
        response_file=args.response_store,
        shares_prefixes=args.share_prefixes,
        uses_priority=args.scheduling_policy == "priority",
        uds=args.uds,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        allowed_origins=tuple(args.allowed_origins),
        logs_access=not args.disable_access_log,
        stats_interval_s=None if args.disable_log_stats else _stats_interval(environment),
        chat_template=args.chat_template,
        generation_config=args.generation_config,
        sampling=args.override_generation_config,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        closes_objects=not args.open_objects,
        chat_template_kwargs=args.default_chat_template_kwargs,
        kv_events=kv_events_config(args.kv_events_config),
        traces=trace_endpoint(args.otlp_traces_endpoint),
        num_workers=args.api_workers,
        ignored=args.ignored_flags or {},
    )


def _keys_of(environment: Mapping[str, str], names: Sequence[str]) -> list[str]:
    return [environment[name] for name in names if environment.get(name)]


def parse_known(
    parser: argparse.ArgumentParser, arguments: Sequence[str], namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Parse arguments; an unknown flag is told with the one that may be meant. Flags as vLLM reads them."""
    args, unknown = parser.parse_known_args([_dashed(argument) for argument in arguments], namespace)
    for argument in unknown:
        flag = argument.partition("=")[0]
        if not flag.startswith("-"):
            parser.error(f"unexpected argument: {flag}")
        close = get_close_matches(flag, parser._option_string_actions, n=1)
        parser.error(f"no such flag: {flag}" + (f"; did you mean {close[0]}?" if close else ""))
    return args


def _dashed(argument: str) -> str:
    """Return `--max_model_len=5` as `--max-model-len=5`, and `--compilation-config.mode` as `--compilation-config`."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return argument
    return flag.replace("_", "-").partition(".")[0] + equals + value


def number(text: str) -> int:
    """Return an integer of "32", "32k" (32,000), "32K" (32,768), "1.5m", "1M": as vLLM reads them."""
    match = re.fullmatch(r"(\d+|\d+\.\d+(?=[kmgt]))([kKmMgGtT]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a number: {text}")
    return round(float(match[1]) * _UNITS[match[2]])


def number_or_auto(text: str) -> int | None:
    """Return what `number` does; None of "auto" and "-1"."""
    return None if text.strip() in ("auto", "-1") else number(text)


class FlagParser(OneLineParser):
    """A parser of flags that stand on the command line, or in a file: what is wrong in that is told with its name."""

    file: str | None = None  # whose flags are parsed now

    def error(self, message: str) -> NoReturn:
        """Exit with one line; ConfigError for flags of a file."""
        if self.file is not None:
            raise ConfigError(f"{self.file}: {message}")
        super().error(message)


def parse_with_config_file(parser: FlagParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags of `--config FILE`, overridden by those of the command line. Raises ConfigError for the file.

    The file's are parsed by themselves: a list at their end would swallow the MODEL that comes next.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?")
    path = finder.parse_known_args(list(arguments))[0].config
    args = argparse.Namespace()
    if path is not None:
        flags = _flags_of_file(path)
        parser.file = path
        try:
            parse_known(parser, flags, args)
        finally:
            parser.file = None
        if args.model_tag is not None:  # the second of two values stands where the command line has MODEL
            raise ConfigError(f"{path}: unexpected value {args.model_tag!r}: a list, for a flag that takes one value")
    return parse_known(parser, arguments, args)


def _flags_of_file(path: str) -> list[str]:
    import yaml  # not needed by most command lines, and not quick

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the file of flags {path!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold flags, one `name: value` a line")
    return [flag for name, value in values.items() for flag in _as_flag(path, str(name), value)]


def _as_flag(path: str, name: str, value: Any) -> list[str]:
    """Return `name: value` as flags: true is the flag alone, false and null are nothing, a list is its values."""
    flag = f"--{name.replace('_', '-')}"
    if flag == "--config":
        raise ConfigError(f"{path} must not name another --config")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, dict) or flag == "--allowed-origins":
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"{flag}={item}" for item in value] if flag in _REPEATED else [flag, *map(str, value)]
    return [f"{flag}={value}"]


def _origins(text: str) -> tuple[str, ...]:
    """Return a JSON list of origins, or one origin."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = [text]
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise argparse.ArgumentTypeError(f"not a JSON list of origins: {text}")
    return tuple(values)


def _path(text: str) -> Path:
    """Return a path of at least one character: Path takes nothing for the folder that it is in."""
    if not text:
        raise argparse.ArgumentTypeError("no path was given")
    return Path(text)


def _object(text: str) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def default_log_level(environment: Mapping[str, str] = os.environ) -> str:
    """Return what vLLM's variable says, if it is one of ours."""
    level = environment.get(LOG_LEVEL_VARIABLE, "").lower()
    return level if level in LOG_LEVELS else "info"


def _stats_interval(environment: Mapping[str, str]) -> float:
    for name in STATS_INTERVAL_VARIABLES:
        if text := environment.get(name):
            try:
                seconds = float(text)
            except ValueError:
                seconds = 0.0
            if not 0 < seconds < float("inf"):
                raise ConfigError(f"{name}={text}: must be a number of seconds")
            return seconds
    return 10.0
