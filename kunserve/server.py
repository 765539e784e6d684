"""`python -m kunserve.server`: arguments -> config -> engine -> aiohttp app; drain and stop."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvloop
from aiohttp import web

from kunserve.api.app import create_app
from kunserve.api.backend import ApiSettings, ModelInfo
from kunserve.api.chat_template import ChatTemplate
from kunserve.api.defaults import sampling_defaults
from kunserve.api.reasoning import END as REASONING_END
from kunserve.api.structured import Grammars
from kunserve.api.tool_parsers import parser_of_template
from kunserve.config import EngineConfig, parse_devices, parse_size
from kunserve.engine.launch import Served, launch
from kunserve.engine.policy import OverloadPolicy
from kunserve.errors import ConfigError
from kunserve.flags import (
    LOG_LEVELS,
    HttpConfig,
    add_http_flags,
    default_log_level,
    http_config,
    number,
    number_or_auto,
    parse_known,
    with_config_file,
)
from kunserve.grammar.fork_server import Vocabulary
from kunserve.listen import Listener
from kunserve.log import set_up_logging
from kunserve.metrics import Metrics
from kunserve.progress import LoadingProgress
from kunserve.summary import Summary, log_summary

log = structlog.get_logger()

HEARTBEAT_S = 0.01
_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names
# For so long may a thread keep the GIL while others wait: the event loop asks for it again after each system call.
GIL_SWITCH_S = 0.0005


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the process does besides the engine."""

    engine: EngineConfig
    served_names: tuple[str, ...]
    host: str
    port: int
    http: HttpConfig
    shutdown_timeout_s: float
    log_level: str
    log_json: bool


def parse_args(arguments: Sequence[str], prog: str = "python -m kunserve.server") -> ServerConfig:
    """Flags to a config. Exits with usage on unknown flags; ConfigError for values that cannot be."""
    parser = _parser(prog)
    args = parse_known(parser, with_config_file(arguments))
    model = args.model_tag or args.model
    if not model:
        raise ConfigError("no model: give --model NAME, for instance --model smollm2-135m")
    if args.tokenizer not in (None, model):
        parser.error(f"--tokenizer {args.tokenizer} is not supported: a model is served with its own")
    engine = EngineConfig(
        model=model,
        devices=parse_devices(args.devices),
        device_memory_bytes=None if args.device_memory is None else parse_size(args.device_memory),
        num_blocks_override=args.num_gpu_blocks_override,
        kv_bytes=None if args.kv_cache_memory_bytes is None else parse_size(args.kv_cache_memory_bytes),
        block_size=args.block_size,
        dtype=_DTYPES.get(args.dtype, args.dtype),
        load_format="auto" if args.load_format == "safetensors" else args.load_format,
        seed=args.seed,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_num_queued_reqs=args.max_num_queued_reqs,
        async_scheduling=args.async_scheduling,
        pipeline_parallel_size=args.pipeline_parallel_size,
        microbatching=args.microbatching,
        overload_policy=OverloadPolicy(args.overload_policy),
        watermark=args.watermark,
        swap_space_bytes=parse_size(args.swap_space, "GiB"),
        drop_watermark=args.drop_watermark,
        restore_watermark=args.restore_watermark,
        restore_hold_s=args.restore_hold,
        is_pinned=args.pin,
        gpu_memory_utilization=args.gpu_memory_utilization,
        pin_weights=args.pin_weights == "on",
        enforce_eager=args.enforce_eager,
    )
    engine.check()
    if not 0 < args.port < 65536:
        raise ConfigError(f"--port {args.port}: must be between 1 and 65535")
    if not args.shutdown_timeout >= 0:
        raise ConfigError(f"--shutdown-timeout {args.shutdown_timeout}: must be at least 0")
    return ServerConfig(
        engine=engine,
        served_names=tuple(args.served_model_name or [model]),
        host=args.host,
        port=args.port,
        http=http_config(args),
        shutdown_timeout_s=args.shutdown_timeout,
        log_level=args.log_level or default_log_level(),
        log_json=args.log_format == "json",
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    defaults = EngineConfig(model="")
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve a model on all devices of this machine, with an OpenAI-compatible API.",
        epilog=f"Example: {prog} --model smollm2-135m --devices cpu:2 --device-memory 730MiB",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --tokenizer would be taken for --tokenizer-mode
        usage="%(prog)s MODEL [flags]",
    )
    add = parser.add_argument
    add("model_tag", nargs="?", metavar="MODEL", help="same as --model")
    add("--model", help="a model card (see models/), a Hugging Face folder, or a Hub id")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use; the first is shown")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    add(
        "--devices",
        default="auto",
        help="cuda, cuda:0,1: GPUs; cuda:0*4: several logical devices on one; cpu:N: virtual CPU devices; "
        "auto: all GPUs, or cpu:2 where there are none",
    )
    add("--device-memory", metavar="SIZE", help="budget of one device, weights and KV: 730MiB, 18GiB")
    add("--num-gpu-blocks-override", type=int, metavar="N", help="budget is the weights plus N blocks of KV")
    add("--kv-cache-memory-bytes", metavar="SIZE", help="budget is the weights plus so much KV")
    add("--block-size", type=int, default=defaults.block_size, help="tokens of one KV block")
    add(
        "--max-model-len",
        type=number_or_auto,
        help="longest prompt plus answer, in tokens (default: what the card says and fits)",
    )
    add(
        "--dtype",
        default=defaults.dtype,
        help="dtype of weights and KV: auto, float32, float64 (CPU), bfloat16, float16 (CUDA)",
    )
    add(
        "--load-format",
        default=defaults.load_format,
        choices=("auto", "safetensors", "dummy"),
        help="dummy: random weights",
    )
    add("--tokenizer", help=argparse.SUPPRESS)  # the model's own
    add("--seed", type=int, default=defaults.seed, help="of dummy weights and of requests that bring none")
    add("--max-num-batched-tokens", type=number, default=defaults.max_num_batched_tokens, help="token budget of a step")
    add(
        "--max-num-seqs",
        type=int,
        default=defaults.max_num_seqs,
        help="running requests of one GPU; chains of several have as many times more",
    )
    add("--max-num-queued-reqs", type=int, default=defaults.max_num_queued_reqs, help="waiting requests before 503")
    add(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=defaults.async_scheduling,
        help="plan the next step while the current one runs",
    )
    add("--pipeline-parallel-size", "-pp", type=int, metavar="S", help="devices of one chain (default: as few as fit)")
    add(
        "--microbatching",
        choices=("lookahead", "tokens"),
        default=defaults.microbatching,
        help="of chains: parts of the backlog of equal predicted time, or of equally many tokens",
    )
    add(
        "--overload-policy",
        choices=[str(policy) for policy in OverloadPolicy],
        default=str(defaults.overload_policy),
        help="what happens when KV memory is full",
    )
    add(
        "--swap-space",
        metavar="SIZE",
        default="4GiB",
        help="host memory for KV with --overload-policy swap; a plain number is GiB",
    )
    add("--watermark", type=float, default=defaults.watermark, help="share of blocks that admission leaves free")
    add(
        "--drop-watermark", type=float, default=defaults.drop_watermark, help="demand over mapped KV that drops weights"
    )
    add(
        "--restore-watermark",
        type=float,
        default=defaults.restore_watermark,
        help="demand over undropped KV below which weights come back",
    )
    add("--restore-hold", type=float, default=defaults.restore_hold_s, metavar="S", help="seconds it must stay below")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=defaults.gpu_memory_utilization,
        help="share of a GPU's memory to use, where --device-memory is not given",
    )
    add("--pin-weights", choices=("on", "off"), default="on", help="keep the host copy of the weights pinned (CUDA)")
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=False, help="capture no CUDA graphs")
    add("--pin", action="store_true", help="regroup only when an operator asks")
    add(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds that accepted requests get to finish"
    )
    add_http_flags(parser)
    add("--log-level", choices=LOG_LEVELS, help="least level to log (default: VLLM_LOGGING_LEVEL, or info)")
    add("--log-format", default="console", choices=("console", "json"), help="how to log")
    return parser


async def serve(config: ServerConfig) -> None:
    """Load, listen, and serve until a signal; then drain and stop. ConfigError if it cannot start."""
    _check_files(config.http)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, _request_stop, stop)
    listener = Listener(config.host, config.port, config.http.uds, config.http.ssl_context())
    try:
        async with listener.answering_probes():
            with LoadingProgress() as progress:
                served = await launch(config.engine, config.served_names[0], progress.update)
        await _serve(config, served, listener, stop)
    finally:
        listener.close()
    log.info("stopped")


async def _serve(config: ServerConfig, served: Served, listener: Listener, stop: asyncio.Event) -> None:
    """Serve what is loaded until `stop`; then drain. Closes the engine."""
    engine = served.engine
    sys.setswitchinterval(GIL_SWITCH_S)
    gc.freeze()  # what is loaded stays: collections need not look at it again, and so never hold up the loop
    try:
        await engine.start()
        runner = web.AppRunner(_app(config, served), handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        watchers = [asyncio.create_task(_watch_loop(served.metrics))]
        if (interval_s := config.http.stats_interval_s) is not None:
            watchers.append(asyncio.create_task(log_summary(Summary(served.metrics, engine.stats), interval_s)))
        try:
            await listener.serve(runner)
            log.info("ready", url=listener.url, model=config.served_names[0])
            await _first_of(stop.wait(), engine.wait())
            if not engine.is_running:
                raise ConfigError("the engine has stopped; the log says why")
            log.info("stopping", drain_s=config.shutdown_timeout_s, running=engine.num_running)
            stop.clear()
            await _first_of(engine.stop(config.shutdown_timeout_s), stop.wait())  # a second Ctrl-C
        finally:
            for watcher in watchers:
                watcher.cancel()
            await engine.stop()
            await runner.cleanup()
    finally:
        await served.close()


async def _first_of(*awaitables: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them is done, and cancel the others."""
    tasks = [asyncio.create_task(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _request_stop(stop: asyncio.Event) -> None:
    stop.set()


def _check_files(http: HttpConfig) -> None:
    """Read what people wrote by hand before minutes of loading, not after. ConfigError if it cannot be used."""
    if http.chat_template is not None:
        ChatTemplate(_read_template(http.chat_template))
    sampling_defaults("vllm" if http.generation_config == "auto" else http.generation_config, None, http.sampling)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from None


def _app(config: ServerConfig, served: Served) -> web.Application:
    tokenizer, path = served.tokenizer, config.http.chat_template
    source = tokenizer.chat_template if path is None else _read_template(path)
    template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
    files, http = served.files, config.http
    recommended = None if files.card is None else files.card.defaults.sampling
    sampling = sampling_defaults(http.generation_config, files.folder, http.sampling, recommended)
    if sampling:
        log.info("defaults of requests", **sampling)
    max_model_len = served.engine.limits.max_model_len
    kwargs = config.http.chat_template_kwargs
    info = ModelInfo(config.served_names, max_model_len, served.files.name, int(time.time()), sampling, kwargs)
    settings = ApiSettings(
        api_keys=config.http.api_keys,
        admin_keys=config.http.admin_keys,
        allowed_origins=config.http.allowed_origins,
        max_num_queued_reqs=config.engine.max_num_queued_reqs,
        max_num_queued_tokens=config.http.max_num_queued_tokens,
        uses_priority=config.http.uses_priority,
        logs_access=config.http.logs_access,
        tool_call_parser=config.http.tool_call_parser or parser_of_template(source),
        reasoning_parser=config.http.reasoning_parser,
    )
    model = served.engine.model
    grammars = Grammars(
        Vocabulary(tokenizer.to_json, max(model.vocab_size, tokenizer.vocab_size), model.eos_token_ids),
        tokenizer.token_id(REASONING_END) if config.http.reasoning_parser else None,
        served.metrics.structure_process_died,
    )
    return create_app(served.engine, tokenizer, template, info, served.metrics, settings, grammars)


async def _watch_loop(metrics: Metrics) -> None:
    """Measure how late the event loop is: its own figure of health, seen in `kunserve:event_loop_lag_seconds`."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        metrics.loop_lag(max(0.0, loop.time() - due))


def _without_effect(engine: EngineConfig) -> dict[str, str]:
    """Flags of GPUs that were given for CPU devices, and why they do nothing."""
    if engine.devices.kind != "cpu":
        return {}
    default, names = EngineConfig(model=""), ("gpu_memory_utilization", "enforce_eager", "pin_weights")
    given = [name for name in names if getattr(engine, name) != getattr(default, name)]
    return {f"--{name.replace('_', '-')}": "the devices are CPUs (GPUs: --devices cuda)" for name in given}


def run(arguments: Sequence[str], prog: str = "python -m kunserve.server") -> None:
    """Serve until a signal; errors that a user can mend end the process with one line."""
    try:
        config = parse_args(arguments, prog)
        set_up_logging(config.log_level, config.log_json)
        for flag, why in {**config.http.ignored, **_without_effect(config.engine)}.items():
            log.warning("a flag that changes nothing here", flag=flag, because=why)
        uvloop.run(serve(config))
    except ConfigError as error:
        sys.exit(f"kunserve: {error.message}")


def main() -> None:
    """Entry point of `python -m kunserve.server`."""
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
