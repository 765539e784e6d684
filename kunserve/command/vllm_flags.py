"""Flags of vLLM's that KunServe has no use for: harmless ones are named in a warning that says why, others refused.

A person swaps `vllm serve` for `kunserve serve` and changes nothing else on the command line; nothing that they asked
for may be left out in silence. Names as in vLLM 0.32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

# Why -> flags, which are taken with whatever value they have.
IGNORED = {
    "layers are not split; devices form chains if one cannot hold the model (--devices, --pipeline-parallel-size)": (
        *("--tensor-parallel-size", "--data-parallel-size", "--data-parallel-size-local", "--data-parallel-backend"),
        *("--distributed-executor-backend", "--disable-custom-all-reduce"),
    ),
    "the prefix cache is what it is (--enable-prefix-caching)": (
        *("--prefix-caching-hash-algo", "--enable-prompt-tokens-details", "--disable-cascade-attn"),
    ),
    "prompts are always computed in pieces": ("--enable-chunked-prefill", "--scheduler-reserve-full-isl"),
    "no code of a model's repository is run": ("--trust-remote-code",),
    "HTTP is in the process of the engine, or in --api-workers": (
        "--disable-frontend-multiprocessing",
        "--api-server-count",
        "--renderer-num-workers",
    ),
    "it is always so": (
        *("--enable-request-id-headers", "--enable-auto-tool-choice", "--enable-log-requests", "--stream-interval"),
        "--use-tqdm-on-load",
    ),
    "prompts and answers are never logged, requests are (--disable-access-log)": (
        *("--disable-log-requests", "--max-log-len", "--uvicorn-log-level"),
    ),
    "kernels and graphs are chosen by the server": (
        *("--max-seq-len-to-capture", "--cudagraph-capture-sizes", "--max-cudagraph-capture-size"),
        *("--compilation-config", "--optimization-level", "--attention-backend", "--performance-mode"),
        *("--enable-flashinfer-autotune",),
    ),
    "weights come from the folder, or from the Hub's cache (HF_HOME)": (
        *("--download-dir", "--max-parallel-loading-workers", "--safetensors-load-strategy"),
    ),
    "up to 20 may be asked for": ("--max-logprobs",),
    "grammars are compiled by llguidance": ("--structured-outputs-config", "--guided-decoding-backend"),
    "/metrics and /kunserve/state tell the load": ("--enable-server-load-tracking",),
    "no route depends on it": ("--root-path", "--disable-fastapi-docs", "--enable-offline-docs"),
}
# Those of them that have no value, and so one more with `--no-`.
_SWITCHES = frozenset(
    (
        *("--disable-custom-all-reduce", "--enable-prompt-tokens-details"),
        *("--disable-cascade-attn", "--enable-chunked-prefill", "--scheduler-reserve-full-isl", "--trust-remote-code"),
        *("--disable-frontend-multiprocessing", "--enable-request-id-headers", "--enable-auto-tool-choice"),
        *("--enable-log-requests", "--use-tqdm-on-load", "--disable-log-requests", "--enable-server-load-tracking"),
        *("--disable-fastapi-docs", "--enable-offline-docs", "--enable-flashinfer-autotune"),
    )
)
_SHORT = {
    "--tensor-parallel-size": ("-tp",),
    "--data-parallel-size": ("-dp",),
    "--data-parallel-size-local": ("-dpl",),
    "--data-parallel-backend": ("-dpb",),
    "--optimization-level": ("-O",),
    "--compilation-config": ("-cc",),
    "--api-server-count": ("-asc",),
}
# Values that change nothing; others would, so they are refused.
SAME = {
    "--revision": ("main",),
    "--runner": ("auto", "generate"),
    "--task": ("auto", "generate"),
    "--convert": ("auto", "none"),
    "--model-impl": ("auto",),
    "--config-format": ("auto", "hf"),
    "--tokenizer-mode": ("auto", "hf"),
    "--chat-template-content-format": ("auto", "string"),
    "--response-role": ("assistant",),
    "--logprobs-mode": ("raw_logprobs",),
    "--cpu-offload-gb": ("0", "0.0"),
    "--allowed-methods": ('["*"]', "*"),
    "--allowed-headers": ('["*"]', "*"),
}
# Why -> flags that nobody should believe to be in force.
REFUSED = {
    "a checkpoint says itself how it is quantized": ("--quantization-config",),
    "there is no speculative decoding": (
        *("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"),
    ),
    "there are no LoRA adapters": (
        *("--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank", "--max-cpu-loras", "--lora-dtype"),
        *("--fully-sharded-loras", "--lora-target-modules"),
    ),
    "the model's own files are used as they are": (
        *("--tokenizer-revision", "--code-revision", "--hf-overrides", "--hf-config-path", "--skip-tokenizer-init"),
    ),
    "only text is served": (
        *("--limit-mm-per-prompt", "--mm-processor-kwargs", "--media-io-kwargs", "--allowed-local-media-path"),
        *("--language-model-only", "--enable-prompt-embeds", "--pooler-config"),
    ),
    "all experts of a layer are on one device": (
        *("--enable-expert-parallel", "-ep", "--enable-eplb", "--all2all-backend", "--moe-backend"),
    ),
    "KV stays on the devices of this server (see --overload-policy)": (
        *("--kv-transfer-config", "--kv-offloading-size", "--kv-offloading-backend"),
    ),
    "one machine serves": (
        *("--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless", "--data-parallel-rank"),
        *("--data-parallel-address", "--data-parallel-rpc-port", "--data-parallel-external-lb"),
        "--data-parallel-hybrid-lb",
    ),
    "no code is loaded into the server": (
        *("--middleware", "--logits-processors", "--tool-parser-plugin", "--reasoning-parser-plugin"),
        *("--scheduler-cls", "--worker-cls", "--worker-extension-cls", "--io-processor-plugin"),
    ),
    "put a proxy in front of the server": (
        "--ssl-ca-certs",
        "--ssl-cert-reqs",
        "--ssl-ciphers",
        "--enable-ssl-refresh",
    ),
    "set HF_TOKEN instead": ("--hf-token",),
    "there is no sleep mode: weights leave memory when KV needs it": ("--enable-sleep-mode",),
    "spans have the phases of a request, and no calls": ("--collect-detailed-traces",),
}


class _Ignore(argparse.Action):
    """Remembers that a flag was given, and why its value is not needed (`const`)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """See argparse."""
        namespace.ignored_flags = {**(namespace.ignored_flags or {}), option_string: self.const}


class _Refuse(argparse.Action):
    """Ends the process with the reason (`const`) why a flag is refused."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        """See argparse."""
        parser.error(f"{option_string} is not supported: {self.const}")


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Add them, but for those that the parser has already."""

    def add(names: Sequence[str], **how: Any) -> None:
        parser.add_argument(*names, dest="ignored_flags", help=argparse.SUPPRESS, **how)

    for why, flags in IGNORED.items():
        for flag in flags:
            names = [flag, *_SHORT.get(flag, ())]
            if flag in _SWITCHES:
                add([*names, "--no-" + flag.removeprefix("--")], action=_Ignore, const=why, nargs=0)
            else:
                add(names, action=_Ignore, const=why, nargs="+" if flag == "--cudagraph-capture-sizes" else None)
    for flag, values in SAME.items():
        add([flag], action=_Ignore, const="it is always so", choices=values)
    for why, flags in REFUSED.items():
        for flag in flags:
            add([flag], action=_Refuse, const=why, nargs="*")
