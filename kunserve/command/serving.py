"""The server's process: listen, load, serve until a signal, drain and stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog
from aiohttp import web

from kunserve.api.app import create_app
from kunserve.api.ask.chat_template import ChatTemplate
from kunserve.api.ask.defaults import sampling_defaults, settings_not_obeyed
from kunserve.api.operate.loading import loading_handler
from kunserve.api.say.calls.formats import format_of_template
from kunserve.api.say.reasoning import REASONING_FORMATS, reasoning_of_template
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.api.wire.grammars import Grammars
from kunserve.command.arguments import ServerConfig
from kunserve.command.flags import NO_FORMAT, HttpConfig
from kunserve.command.interpreter import set_up_interpreter
from kunserve.command.listen import Listener
from kunserve.command.worker import Setup, of_worker
from kunserve.command.workers import Workers
from kunserve.config import DEFAULT_KV_BYTES, EngineConfig
from kunserve.errors import ConfigError, InvalidRequestError
from kunserve.grammar.fork_server import Vocabulary
from kunserve.host.cgroup import available_bytes
from kunserve.host.memory import HUGE_BYTES, MemoryAhead
from kunserve.observe.metrics import Metrics
from kunserve.observe.summary import Summary, log_summary
from kunserve.progress import LoadingProgress

if TYPE_CHECKING:
    from kunserve.engine.launch.launch import Served
    from kunserve.observe.kv_publisher import KVPublisher
    from kunserve.observe.tracer import Tracer

log = structlog.get_logger()

HEARTBEAT_S = 0.01


async def serve(config: ServerConfig) -> None:
    """Load, listen, and serve until a signal; then drain and stop. ConfigError if it cannot start."""
    _check_files(config.http)
    stuck = list[str]()
    try:
        with contextlib.ExitStack() as stack:
            events = _kv_events(config)
            if events is not None:
                stack.callback(events.close)
            await _load_and_serve(config, events, stuck)
    finally:
        if stuck:
            _end_without(stuck, has_failed=sys.exc_info()[1] is not None)
    log.info("stopped")


async def _load_and_serve(config: ServerConfig, events: KVPublisher | None, stuck: list[str]) -> None:
    """Do the work of `serve`; `stuck` is filled with the names of devices whose threads never end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, _request_stop, stop)
    listener = Listener(config.host, config.port, config.http.uds, config.http.ssl_context())
    try:
        progress = LoadingProgress()
        async with listener.answering_with(loading_handler(lambda: progress.newest)):
            with progress:
                served = await _launch_or_stop(config, progress, stop)
        for flag, why in (flags_without_effect(config.engine) | _without_cache(config)).items():
            log.warning("flag without effect", flag=flag, because=why)
        if events is not None and served.engine.fleet.prefixes is not None:
            served.engine.fleet.prefixes.listener = events
            events.start()
        await _serve(config, served, listener, stop, stuck)
    finally:
        listener.close()


async def _launch_or_stop(config: ServerConfig, progress: LoadingProgress, stop: asyncio.Event) -> Served:
    """Load the model. A signal meanwhile ends the process at once.

    Threads that download or read cannot be ended: a process that waited for them would go on for minutes. What they
    leave behind, the next start completes.
    """
    launching = asyncio.create_task(_launch(config, progress))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((launching, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not launching.done():
        log.info("stopped", before="the model was loaded")
        if config.http.uds is not None:
            config.http.uds.unlink(missing_ok=True)
        sys.stderr.flush()
        os._exit(0)
    stopping.cancel()
    return await launching


async def _launch(config: ServerConfig, progress: LoadingProgress) -> Served:
    ahead = _memory_ahead(config.engine)
    module = await asyncio.to_thread(
        import_module, "kunserve.engine.launch.launch"
    )  # with torch, for seconds: pages load
    served: Served = await module.launch(config.engine, config.served_names[0], progress.update, ahead)
    return served


def _memory_ahead(engine: EngineConfig) -> MemoryAhead | None:
    """Begin to take what CPU devices will have at least, while torch is imported; None where that is not known."""
    devices = engine.devices
    if devices.kind != "cpu" or engine.num_blocks_override is not None:
        return None
    kv_bytes = DEFAULT_KV_BYTES if engine.kv_bytes is None else engine.kv_bytes
    least = kv_bytes if engine.device_memory_bytes is None else engine.device_memory_bytes
    share = available_bytes() // 2 // len(devices.indices)  # more than that is a matter of seconds anyway
    return MemoryAhead(len(devices.indices), min(least, share) // HUGE_BYTES * HUGE_BYTES)


async def _serve(
    config: ServerConfig, served: Served, listener: Listener, stop: asyncio.Event, stuck: list[str]
) -> None:
    """Serve what is loaded until `stop`; then drain. Closes the engine; `stuck` as in `_load_and_serve`."""
    engine, is_hurried, tracer = served.engine, False, _tracer(config)
    try:
        await engine.start()
        app, setup = application_of(config, served, tracer)
        runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        workers = Workers(setup, runner, listener.fileno(), config.http.num_workers)
        watchers = [asyncio.create_task(_watch_loop(served.metrics))]
        if (interval_s := config.http.stats_interval_s) is not None:
            watchers.append(asyncio.create_task(log_summary(Summary(served.metrics, engine.stats), interval_s)))
        try:
            await (workers.open() if config.http.num_workers else listener.serve(runner))
            set_up_interpreter()
            log.info("ready", url=listener.url, model=config.served_names[0])
            await _first_of(stop.wait(), engine.wait())
            if not engine.is_running:
                raise ConfigError("the engine has stopped; the log says why")
            log.info("stopping", drain_s=config.shutdown_timeout_s, running=engine.num_running)
            stop.clear()
            await _first_of(engine.stop(config.shutdown_timeout_s), stop.wait())  # a second Ctrl-C
            is_hurried = stop.is_set()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await (engine.stop(last_step_s=0.0) if is_hurried else engine.stop())
            await workers.close()
            await runner.cleanup()
    finally:
        await served.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
        stuck += served.machine.stuck()


def _end_without(devices: Sequence[str], *, has_failed: bool) -> NoReturn:
    """End the process although threads of devices do not: nobody can make them, and Python would wait for ever."""
    log.warning("devices do not answer: the process ends without them", devices=devices)
    if has_failed:
        sys.stderr.write("kunserve: the engine has stopped; the log says why\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(has_failed))


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


def application_of(config: ServerConfig, served: Served, tracer: Tracer | None) -> tuple[web.Application, Setup]:
    """Return all routes on the engine of this process, and what workers have to know to have those of clients."""
    tokenizer, path = served.tokenizer, config.http.chat_template
    source = tokenizer.chat_template if path is None else _read_template(path)
    template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
    info = _model_info(config, served, source)
    settings = _api_settings(config, source, template)
    log.info("formats", tool_call_parser=settings.tool_call_parser, reasoning_parser=settings.reasoning_parser)
    thoughts = REASONING_FORMATS.get(settings.reasoning_parser or "")
    model, files = served.engine.model, served.files
    grammars = Grammars(
        Vocabulary(tokenizer.to_json, max(model.vocab_size, tokenizer.vocab_size), model.eos_token_ids),
        tokenizer.token_id(thoughts.ends[0]) if thoughts is not None and thoughts.is_before_structure else None,
        served.metrics.structure_process_died,
        config.http.closes_objects,
    )
    setup = Setup(
        info,
        of_worker(settings, config.http.num_workers),
        config.http,
        source,
        files.folder,
        files.config.vocab_size,
        files.config.eos_token_ids,
        model.eos_token_ids,
        served.engine.limits,
        config.log_level,
        config.log_json,
    )
    if config.http.num_workers:  # they have logged what they pass on, and say which browsers may read it
        settings = replace(settings, logs_access=False, allowed_origins=())
    app = create_app(served.engine, tokenizer, template, info, served.metrics, settings, grammars, tracer)
    return app, setup


def _model_info(config: ServerConfig, served: Served, template: str | None) -> ModelInfo:
    files, http = served.files, config.http
    recommended = None if files.card is None else files.card.defaults.sampling
    sampling = sampling_defaults(http.generation_config, files.folder, http.sampling, recommended)
    if sampling:
        log.info("defaults of requests", **sampling)
    if ignored := settings_not_obeyed(http.generation_config, files.folder):
        log.warning("settings of generation_config.json that are not obeyed", **ignored)
    stop, max_tokens = sampling.pop("stop", ()), sampling.pop("max_tokens", None)
    return ModelInfo(
        config.served_names,
        served.engine.limits.max_model_len,
        files.name,
        int(time.time()),
        sampling,
        http.chat_template_kwargs,
        {**served.tokenizer.special_tokens, "chat_template": template},
        vocab_size=files.config.vocab_size,
        max_tokens=max_tokens,
        stop=stop if isinstance(stop, str) else tuple(stop),
    )


def _api_settings(config: ServerConfig, source: str | None, template: ChatTemplate | None) -> ApiSettings:
    http = config.http
    return ApiSettings(
        api_keys=http.api_keys,
        admin_keys=http.admin_keys,
        front_keys=http.front_keys,
        allowed_origins=http.allowed_origins,
        max_num_queued_reqs=config.engine.max_num_queued_reqs,
        max_num_queued_tokens=http.max_num_queued_tokens,
        max_body_memory_bytes=http.max_body_memory_bytes,
        max_response_bytes=http.max_response_bytes,
        response_file=http.response_file,
        shares_prefixes=http.shares_prefixes,
        uses_priority=http.uses_priority,
        logs_access=http.logs_access,
        tool_call_parser=_chosen(http.tool_call_parser, format_of_template(source)),
        reasoning_parser=_chosen(http.reasoning_parser, reasoning_of_template(source, _new_conversation(template))),
    )


def _new_conversation(template: ChatTemplate | None) -> str:
    """Return what a template makes of a new conversation; "" if it refuses it."""
    try:
        return "" if template is None else template.render([{"role": "user", "content": "Hi"}])
    except InvalidRequestError:
        return ""


def _chosen(asked: str | None, shown: str | None) -> str | None:
    """Return the name of a format: the one that was asked for, else what the template shows."""
    return None if asked == NO_FORMAT else asked or shown


async def _watch_loop(metrics: Metrics) -> None:
    """Measure how late the event loop is: its own figure of health, seen in `kunserve:event_loop_lag_seconds`."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        metrics.loop_lag(max(0.0, loop.time() - due))


def _kv_events(config: ServerConfig) -> KVPublisher | None:
    """Open what tells routers about the prefix cache, if it is wanted. ConfigError if it cannot be."""
    if config.http.kv_events is None:
        return None
    from kunserve.observe.kv_publisher import KVPublisher  # needs the extra kv-events

    return KVPublisher(config.http.kv_events, config.engine.block_size)


def _tracer(config: ServerConfig) -> Tracer | None:
    """Open what sends traces, if they are wanted."""
    if config.http.traces is None:
        return None
    from kunserve.observe.tracer import open_tracer  # needs the extra otel

    return open_tracer(config.http.traces, config.served_names[0])


def _without_cache(config: ServerConfig) -> dict[str, str]:
    """Return flags that do nothing where there is no prefix cache, and why."""
    if config.http.kv_events is None or config.engine.enable_prefix_caching:
        return {}
    return {"--kv-events-config": "there is no prefix cache (--enable-prefix-caching)"}


def flags_without_effect(engine: EngineConfig) -> dict[str, str]:
    """Return flags of GPUs that were given for CPU devices, and why they do nothing."""
    if engine.devices.resolved().kind != "cpu":
        return {}
    default, names = EngineConfig(model=""), ("gpu_memory_utilization", "enforce_eager")
    given = [name for name in names if getattr(engine, name) != getattr(default, name)]
    return {f"--{name.replace('_', '-')}": "the devices are CPUs (GPUs: --devices cuda)" for name in given}
