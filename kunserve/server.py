"""`python -m kunserve.server`: arguments -> config -> engine -> aiohttp app; drain and stop."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import uvloop
from aiohttp import web

from kunserve.api.app import create_app
from kunserve.api.backend import ApiSettings, ModelInfo
from kunserve.api.chat_template import ChatTemplate
from kunserve.config import EngineConfig, parse_devices, parse_size
from kunserve.engine.launch import Served, launch
from kunserve.engine.policy import OverloadPolicy
from kunserve.errors import ConfigError
from kunserve.log import set_up_logging
from kunserve.metrics import Metrics
from kunserve.progress import LoadingProgress

log = structlog.get_logger()

HEARTBEAT_S = 0.01


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the process does besides the engine."""

    engine: EngineConfig
    served_names: tuple[str, ...]
    host: str
    port: int
    shutdown_timeout_s: float
    admin_keys: tuple[str, ...]
    log_level: str
    log_json: bool


def parse_args(arguments: Sequence[str]) -> ServerConfig:
    """Flags to a config. Exits with usage on unknown flags; ConfigError for values that cannot be."""
    args = _parser().parse_args(arguments)
    model = args.model or args.model_tag
    if not model:
        raise ConfigError("no model: give --model NAME, for instance --model smollm2-135m")
    engine = EngineConfig(
        model=model,
        devices=parse_devices(args.devices),
        device_memory_bytes=None if args.device_memory is None else parse_size(args.device_memory),
        num_blocks_override=args.num_gpu_blocks_override,
        block_size=args.block_size,
        dtype=args.dtype,
        load_format=args.load_format,
        seed=args.seed,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_num_queued_reqs=args.max_num_queued_reqs,
        pipeline_parallel_size=args.pipeline_parallel_size,
        overload_policy=OverloadPolicy(args.overload_policy),
        watermark=args.watermark,
        drop_watermark=args.drop_watermark,
        restore_watermark=args.restore_watermark,
        restore_hold_s=args.restore_hold,
        is_pinned=args.pin,
    )
    engine.check()
    return ServerConfig(
        engine=engine,
        served_names=tuple(args.served_model_name or [model]),
        host=args.host,
        port=args.port,
        shutdown_timeout_s=args.shutdown_timeout,
        admin_keys=tuple(args.admin_key),
        log_level=args.log_level,
        log_json=args.log_format == "json",
    )


def _parser() -> argparse.ArgumentParser:
    defaults = EngineConfig(model="")
    parser = argparse.ArgumentParser(
        prog="python -m kunserve.server",
        description="Serve a model on all devices of this machine, with an OpenAI-compatible API.",
        epilog="Example: python -m kunserve.server --model smollm2-135m --devices cpu:2 --device-memory 730MiB",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model_tag", nargs="?", metavar="MODEL", help="same as --model")
    add("--model", help="a model card (see models/), a Hugging Face folder, or a Hub id")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use; the first is shown")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--devices", default="cpu:2", help="cpu:N is N virtual CPU devices")
    add("--device-memory", metavar="SIZE", help="budget of one device, weights and KV: 730MiB, 18GiB")
    add("--num-gpu-blocks-override", type=int, metavar="N", help="budget is the weights plus N blocks of KV")
    add("--block-size", type=int, default=defaults.block_size, help="tokens of one KV block")
    add(
        "--max-model-len", type=int, help="longest prompt plus answer, in tokens (default: what the card says and fits)"
    )
    add("--dtype", default=defaults.dtype, help="dtype of weights and KV: auto, float32, float64")
    add("--load-format", default=defaults.load_format, choices=("auto", "dummy"), help="dummy: random weights")
    add("--seed", type=int, default=defaults.seed, help="of dummy weights and of requests that bring none")
    add("--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens, help="token budget of a step")
    add("--max-num-seqs", type=int, default=defaults.max_num_seqs, help="running requests of one group")
    add("--max-num-queued-reqs", type=int, default=defaults.max_num_queued_reqs, help="waiting requests before 503")
    add("--pipeline-parallel-size", "-pp", type=int, metavar="S", help="devices of one chain (default: as few as fit)")
    add(
        "--overload-policy",
        choices=[str(policy) for policy in OverloadPolicy],
        default=str(defaults.overload_policy),
        help="what happens when KV memory is full",
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
    add("--pin", action="store_true", help="regroup only when an operator asks")
    add("--admin-key", action="append", default=[], metavar="KEY", help="allows /kunserve/drop and /kunserve/restore")
    add(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds that accepted requests get to finish"
    )
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="least level to log")
    add("--log-format", default="console", choices=("console", "json"), help="how to log")
    return parser


async def serve(config: ServerConfig) -> None:
    """Load, listen, and serve until a signal; then drain and stop. ConfigError if it cannot start."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _request_stop, stop)
    with LoadingProgress() as progress:
        served = await launch(config.engine, config.served_names[0], progress.update)
    engine = served.engine
    try:
        await engine.start()
        runner = web.AppRunner(_app(config, served), handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        heartbeat = asyncio.create_task(_watch_loop(served.metrics))
        try:
            try:
                await web.TCPSite(runner, config.host, config.port).start()
            except OSError as error:
                raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
            log.info("ready", url=f"http://{config.host}:{config.port}", model=config.served_names[0])
            await stop.wait()
            log.info("stopping", drain_s=config.shutdown_timeout_s, running=engine.num_running)
            stop.clear()
            drain = asyncio.create_task(engine.stop(config.shutdown_timeout_s))
            impatient = asyncio.create_task(stop.wait())  # a second Ctrl-C
            await asyncio.wait([drain, impatient], return_when=asyncio.FIRST_COMPLETED)
            impatient.cancel()
            drain.cancel()
        finally:
            heartbeat.cancel()
            await engine.stop()
            await runner.cleanup()
    finally:
        await engine.close()
    log.info("stopped")


def _request_stop(stop: asyncio.Event) -> None:
    stop.set()


def _app(config: ServerConfig, served: Served) -> web.Application:
    tokenizer = served.tokenizer
    template = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    info = ModelInfo(config.served_names, served.engine.limits.max_model_len, served.files.name, int(time.time()))
    return create_app(
        served.engine, tokenizer, template, info, served.metrics, ApiSettings(admin_keys=config.admin_keys)
    )


async def _watch_loop(metrics: Metrics) -> None:
    """Measure how late the event loop is: its own figure of health, seen in `kunserve:event_loop_lag_seconds`."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        metrics.loop_lag(max(0.0, loop.time() - due))


def main() -> None:
    """Entry point of `python -m kunserve.server`."""
    try:
        config = parse_args(sys.argv[1:])
        set_up_logging(config.log_level, config.log_json)
        uvloop.run(serve(config))
    except ConfigError as error:
        sys.exit(f"kunserve: {error.message}")


if __name__ == "__main__":
    main()
