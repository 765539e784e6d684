"""The command line of `python -m kunserve.server` and `kunserve serve`: flags in groups, and the values they make.

Nothing here imports torch: a wrong flag is refused at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kunserve.command.command_line import checked, or_auto
from kunserve.command.flags import (
    LOG_LEVELS,
    FlagParser,
    HttpConfig,
    add_access_flags,
    add_listen_flags,
    add_request_flags,
    add_router_flags,
    default_log_level,
    http_config,
    number,
    number_or_auto,
    parse_with_config_file,
)
from kunserve.command.vllm_flags import add_vllm_flags
from kunserve.config import CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS, EngineConfig, parse_devices
from kunserve.errors import ConfigError
from kunserve.faults import Fault, parse_faults
from kunserve.model.card import list_cards
from kunserve.model.host_copy import HostCopy
from kunserve.model.quant.scheme import METHODS, SAME_METHODS
from kunserve.policies import OverloadPolicy
from kunserve.sizes import parse_size
from kunserve.version import add_version_flag

DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names
QUANTIZATIONS = (*METHODS, *SAME_METHODS, "gguf")
DEFAULTS = EngineConfig(model="")

Group = argparse._ArgumentGroup  # argparse has no public name for what `add_argument_group` returns


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


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of a flag that has one, unless its text speaks of it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_none = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))  # 0 is a default
        if is_none or not action.option_strings or "default" in text:
            return text
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} (default: on)"
        return f"{text} (default: %(default)s)"


def _own_names(model: str) -> tuple[str, ...]:
    """Return what clients may call a model: a folder by its own name, and by the path that was given."""
    try:
        is_folder = os.path.isdir(model)
    except ValueError:  # no path can hold a zero byte; what is wrong with the name is said where it is looked for
        is_folder = False
    return tuple(dict.fromkeys((Path(model).resolve().name or model, model))) if is_folder else (model,)


def parse_args(arguments: Sequence[str], prog: str = "python -m kunserve.server") -> ServerConfig:
    """Turn flags into a config. Exits with one line on unknown flags; ConfigError for values that cannot be."""
    parser = make_parser(prog)
    args = parse_with_config_file(parser, arguments)
    model = args.model_tag or args.model
    if not model:
        raise ConfigError("no model: give --model NAME, for instance --model smollm2-135m")
    if args.tokenizer not in (None, model):
        parser.error(f"--tokenizer {args.tokenizer} is not supported: a model is served with its own")
    if "" in (args.served_model_name or ()):
        raise ConfigError("--served-model-name must not be empty")
    engine = _engine_config(model, args)
    engine.check()
    if not 0 < args.port < 65536:
        raise ConfigError(f"--port {args.port}: must be between 1 and 65535")
    if not args.shutdown_timeout >= 0:
        raise ConfigError(f"--shutdown-timeout {args.shutdown_timeout}: must be at least 0")
    return ServerConfig(
        engine=engine,
        served_names=tuple(args.served_model_name or _own_names(model)),
        host=args.host,
        port=args.port,
        http=http_config(args),
        shutdown_timeout_s=args.shutdown_timeout,
        log_level=args.log_level or default_log_level(),
        log_json=args.log_format == "json",
    )


def _engine_config(model: str, args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=model,
        devices=parse_devices(args.devices),
        device_memory_bytes=None if args.device_memory is None else parse_size(args.device_memory),
        num_blocks_override=args.num_gpu_blocks_override,
        kv_bytes=None if args.kv_cache_memory_bytes is None else parse_size(args.kv_cache_memory_bytes),
        block_size=args.block_size,
        dtype=DTYPES.get(args.dtype, args.dtype),
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        load_format="auto" if args.load_format == "safetensors" else args.load_format,
        seed=args.seed,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_num_queued_reqs=args.max_num_queued_reqs,
        enable_prefix_caching=args.enable_prefix_caching,
        async_scheduling=args.async_scheduling,
        pipeline_parallel_size=args.pipeline_parallel_size,
        microbatching=args.microbatching,
        overload_policy=OverloadPolicy(args.overload_policy),
        watermark=args.watermark,
        swap_space_bytes=parse_size(args.swap_space, "GiB"),
        drop_watermark=args.drop_watermark,
        restore_watermark=args.restore_watermark,
        restore_hold_s=args.restore_hold,
        device_timeout_s=args.device_timeout,
        windowed_kv_share=args.windowed_kv_share,
        is_pinned=args.pin,
        host_copy=HostCopy(args.host_copy),
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
        faults=args.inject_faults,
    )


def make_parser(prog: str) -> FlagParser:
    """Return the parser of all flags: ours in groups, and those of vLLM's that nobody needs to see."""
    parser = FlagParser(
        prog=prog,
        description="Serve a model on all devices of this machine, with an OpenAI-compatible API.",
        epilog=f"Example: {prog} smollm2-135m --devices cpu:2 --device-memory 730MiB",
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # --tokenizer would be taken for --tokenizer-mode
        usage="%(prog)s MODEL [flags]",
    )
    add_version_flag(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; flags on the command line override it")
    _add_model_flags(parser.add_argument_group("model"))
    _add_device_flags(parser.add_argument_group("devices and memory"))
    _add_batching_flags(parser.add_argument_group("batching and queue"))
    _add_overload_flags(parser.add_argument_group("overload"))
    add_request_flags(parser.add_argument_group("defaults of requests"))
    add_access_flags(parser.add_argument_group("who may send what"))
    add_listen_flags(parser.add_argument_group("listening"))
    add_router_flags(parser.add_argument_group("routers"))
    _add_process_flags(parser.add_argument_group("log and shutdown"))
    add_vllm_flags(parser)
    return parser


def _add_model_flags(group: Group) -> None:
    add = group.add_argument
    add("model_tag", nargs="?", metavar="MODEL", help="same as --model")
    add("--model", help=f"a model card ({', '.join(list_cards())}), a Hugging Face folder, a GGUF file, or a Hub id")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use; the first is shown")
    add(
        "--max-model-len",
        type=number_or_auto,
        metavar="TOKENS",
        help="longest prompt plus answer, in tokens (default: what the card says and fits)",
    )
    add(
        "--dtype",
        default=DEFAULTS.dtype,
        help="dtype of weights and of what is computed: auto, float32, float64 (CPU), bfloat16, float16 (CUDA)",
    )
    add(
        "--kv-cache-dtype",
        default=DEFAULTS.kv_cache_dtype,
        metavar="DTYPE",
        help="dtype of KV: auto: that of the weights; float16, bfloat16: half as many bytes on CPU devices; fp8 (also "
        "fp8_e4m3): half as many on GPUs, with answers that differ from those of 16 bits",
    )
    add(
        "--quantization",
        "-q",
        choices=QUANTIZATIONS,
        metavar="METHOD",
        help="fp8: make 8-bit matrices of a checkpoint in 16 or 32 bits while it loads (e4m3, a scale for each output; "
        "embeddings, head, routers, gates, norms and biases stay as they are). A quantized checkpoint says itself how; "
        f"its own name may be given, too: {', '.join(QUANTIZATIONS)}",
    )
    add(
        "--load-format",
        default=DEFAULTS.load_format,
        choices=("auto", "safetensors", "dummy"),
        help="where weights come from: auto and safetensors: the model's files; dummy: nowhere, they are random",
    )
    add("--tokenizer", help=argparse.SUPPRESS)  # the model's own
    add(
        "--seed",
        type=int,
        default=DEFAULTS.seed,
        metavar="N",
        help="seed of dummy weights, and of requests that have none",
    )


def _add_device_flags(group: Group) -> None:
    add = group.add_argument
    add(
        "--devices",
        default="auto",
        help="cuda, cuda:0,1: GPUs; cuda:0*4: several logical devices on one; cpu:N: virtual CPU devices; "
        "auto: all GPUs, or cpu:2 where there are none",
    )
    add("--device-memory", metavar="SIZE", help="budget of one device, weights and KV together: 730MiB, 18GiB")
    add(
        "--gpu-memory-utilization",
        type=float,
        default=DEFAULTS.gpu_memory_utilization,
        metavar="SHARE",
        help="share of a GPU's memory that weights and KV may take, unless --device-memory says how much",
    )
    add(
        "--num-gpu-blocks-override", type=int, metavar="N", help="make the budget of a device the weights plus N blocks"
    )
    add("--kv-cache-memory-bytes", metavar="SIZE", help="make the budget of a device the weights plus this much KV")
    add("--block-size", type=int, default=DEFAULTS.block_size, metavar="TOKENS", help="tokens of one KV block")
    add(
        "--pipeline-parallel-size",
        "-pp",
        type=int,
        metavar="S",
        help="devices of one chain at launch (default: as few as the model fits)",
    )
    add(
        "--host-copy",
        choices=[str(kind) for kind in HostCopy],
        default=str(DEFAULTS.host_copy),
        help="what weights come back from after a drop: pinned: a copy in host memory; mapped: the checkpoint's pages; "
        "none: another device that has them, or the disk; auto: pinned on GPUs if it fits, else mapped",
    )
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=False, help="capture no CUDA graphs")
    add("--inject-faults", type=_faults, default=DEFAULTS.faults, help=argparse.SUPPRESS)  # into CPU devices, in tests


def _faults(text: str) -> tuple[Fault, ...]:
    """Return what `parse_faults` does, but raise an error whose words argparse shows."""
    try:
        return parse_faults(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_batching_flags(group: Group) -> None:
    add = group.add_argument
    add(
        "--max-num-batched-tokens",
        type=number,
        metavar="TOKENS",
        help=f"token budget of a step (default {CPU_BATCHED_TOKENS} on CPU devices, {GPU_BATCHED_TOKENS} on GPUs)",
    )
    add(
        "--max-num-seqs",
        type=int,
        default=DEFAULTS.max_num_seqs,
        metavar="N",
        help="most requests that run on one device at a time; a chain of S devices runs S times as many",
    )
    add(
        "--max-num-queued-reqs",
        type=int,
        default=DEFAULTS.max_num_queued_reqs,
        metavar="N",
        help="most requests that may wait; the server answers 503 to more",
    )
    add(
        "--max-num-queued-tokens",
        type=int,
        default=4 << 20,
        metavar="N",
        help="most prompt tokens that may wait; the server answers 503 to more",
    )
    add(
        "--scheduling-policy",
        choices=("fcfs", "priority"),
        default="fcfs",
        help="priority: requests with a lower `priority` go first; fcfs: `priority` is ignored",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.enable_prefix_caching,
        help="keep the KV of prompts and answers for requests that begin alike, as long as nobody needs its memory",
    )
    add(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=DEFAULTS.async_scheduling,
        help="plan the next step while the current one runs",
    )
    add(
        "--microbatching",
        choices=("lookahead", "tokens"),
        default=DEFAULTS.microbatching,
        help="how a chain cuts its backlog: into microbatches of equal predicted time, or of equally many tokens",
    )


def _add_overload_flags(group: Group) -> None:
    add = group.add_argument
    add(
        "--overload-policy",
        choices=[str(policy) for policy in OverloadPolicy],
        default=str(DEFAULTS.overload_policy),
        help="what makes room when KV memory is full: drop: replicated weights; for comparison: recompute (as vLLM), "
        "retract (as SGLang), swap (as InferCept), migrate (as Llumnix); queue: requests wait until they surely fit",
    )
    add(
        "--drop-watermark",
        type=float,
        default=DEFAULTS.drop_watermark,
        metavar="SHARE",
        help="demand, as a share of the mapped KV, above which weights are dropped",
    )
    add(
        "--restore-watermark",
        type=float,
        default=DEFAULTS.restore_watermark,
        metavar="SHARE",
        help="demand, as a share of the KV without any drop, below which weights come back",
    )
    add(
        "--restore-hold",
        type=float,
        default=DEFAULTS.restore_hold_s,
        metavar="S",
        help="seconds that demand must stay below --restore-watermark before weights come back",
    )
    add(
        "--device-timeout",
        type=float,
        default=DEFAULTS.device_timeout_s,
        metavar="S",
        help="seconds after which a device that has ended none of its work counts as lost, and others go on; 0: never",
    )
    add("--pin", action="store_true", help="drop and restore weights only when an operator asks")
    add(
        "--watermark",
        type=float,
        default=DEFAULTS.watermark,
        metavar="SHARE",
        help="share of the KV blocks that the admission of requests leaves free",
    )
    add(
        "--windowed-kv-share",
        type=or_auto(checked(float)),
        default="auto",
        metavar="SHARE",
        help="KV of a layer with a window, as a share of that of a layer that sees all, in models with both (Gemma, "
        "gpt-oss): less than 1 frees KV behind windows and so holds more long requests, but fewer short ones; auto "
        "lets it follow the requests",
    )
    add(
        "--swap-space",
        metavar="SIZE",
        default="4GiB",
        help="host memory for the KV of requests that have to make way (policies drop and swap); a plain number is GiB",
    )


def _add_process_flags(group: Group) -> None:
    add = group.add_argument
    add("--log-level", choices=LOG_LEVELS, help="lowest level that is logged (default: VLLM_LOGGING_LEVEL, or info)")
    add("--log-format", default="console", choices=("console", "json"), help="how log lines are written")
    add(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="collector that gets a trace of each request, as http://HOST:4318/v1/traces or grpc://HOST:4317 (default: "
        "none is made); needs the extra otel",
    )
    add("--disable-log-stats", action="store_true", help="log no summary line every ten seconds")
    for name in ("--disable-access-log", "--disable-uvicorn-access-log"):
        add(name, dest="disable_access_log", action="store_true", help="log no line for each request")
    add(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds that accepted requests get to finish"
    )
