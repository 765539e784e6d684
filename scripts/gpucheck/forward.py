"""GPU check: a model's numbers are right, graphs survive a drop, and steps are near what the memory allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from gpucheck.bench import (
    BLOCK_SIZE,
    GIB,
    Bench,
    Placed,
    RandomSource,
    RoundedSource,
    Step,
    forward,
    launch_greedy,
    llama_1b,
    llama_8b,
    make_step,
)
from gpucheck.worker import tell
from kunserve.compute.cuda.decoder import CudaDecoder
from kunserve.compute.torch_ops import as_kv
from kunserve.errors import ConfigError
from kunserve.gpu.copies import bits_of
from kunserve.gpu.device_memory import Layout
from kunserve.gpu.kv_memory import E4M3, KVShape
from kunserve.model.checkpoint import DummySource
from kunserve.model.config import ModelConfig
from kunserve.model.layout import units_of_stage, weight_units
from kunserve.sizes import ceil_div

BATCHES = (1, 16, 64, 256)
CONTEXT = 1024  # tokens of every sequence in a decode step


def logits(bench: Bench, config: ModelConfig | None = None, kv_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Compare mixed prefill and decode in bf16, eager and replayed, with torch in float32 with the same weights.

    Both keep KV in `kv_dtype`, if one is given.
    """
    config = config or replace(llama_1b(), num_layers=4)
    steps = [
        make_step([0, 0, 0], [70, 1, 33], config.vocab_size, 1, 256),
        make_step([70, 1, 33], [1, 1, 60], config.vocab_size, 2, 256),
        *(make_step([71 + i, 2 + i, 93 + i], [1, 1, 1], config.vocab_size, 3 + i, 256) for i in range(4)),
    ]
    results: dict[str, list[Tensor]] = {}
    source = RoundedSource(DummySource(config))
    for name, dtype, is_eager in (
        ("float32", torch.float32, True),
        ("eager", torch.bfloat16, True),
        ("graphs", torch.bfloat16, False),
    ):
        with bench.place(
            config, dtype, source, num_tokens=256, num_seqs=8, num_blocks=64, enforce_eager=is_eager, kv_dtype=kv_dtype
        ) as (placed,):
            results[name] = [_logits(bench, placed, step, config.num_layers).float().cpu() for step in steps]
    errors = {
        name: max(_relative_error(a, b) for a, b in zip(results[name], results["float32"], strict=True))
        for name in ("eager", "graphs")
    }
    return {"relative_error_eager": errors["eager"], "relative_error_graphs": errors["graphs"]}


def _logits(bench: Bench, placed: Placed, step: Step, last_layer: int) -> Tensor:
    return bench.on_device(placed, lambda: forward(placed, step, 0, last_layer))


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm, of the worst row."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def graphs(bench: Bench, config: ModelConfig | None = None) -> dict[str, Any]:
    """Compare a decode step on one device, through a chain of two after a drop, and after the restore: same bits.

    Its tokens, chosen in a graph, are compared with its logits.
    """
    config = config or (replace(llama_1b(), num_layers=8) if bench.is_quick else llama_1b())
    half, layers, source = config.num_layers // 2, config.num_layers, DummySource(config)
    prompt = make_step([0] * 4, [50, 20, 90, 7], config.vocab_size, 1, 128)
    decode = make_step([50, 20, 90, 7], [1] * 4, config.vocab_size, 2, 128)
    with bench.place(config, torch.bfloat16, source, num_tokens=256, num_seqs=4, num_blocks=64, num_devices=2) as both:
        first, second = both
        for placed in both:
            _logits(bench, placed, prompt, layers)
            for _ in range(2):  # appends the same tokens as all that follow
                before = _logits(bench, placed, decode, layers).clone()
        chosen = [bench.on_device(placed, partial(_chosen, placed, decode)) for placed in both]
        same_tokens = all(bool(torch.equal(ids, before.argmax(-1))) for ids in chosen)
        captures = [placed.decoder.graphs.num_captures if placed.decoder.graphs else 0 for placed in both]
        full = first.memory.layout
        for placed, (a, b) in zip(both, ((0, half), (half, layers)), strict=True):
            kv = tuple(n if a <= i < b else 0 for i, n in enumerate(full.kv_chunks))
            placed.memory.rearrange(Layout(units_of_stage(config, a, b), kv))
        x = bench.on_device(first, lambda: forward(first, decode, 0, half))
        chained = bench.on_device(second, lambda: forward(second, decode, half, layers, x)).clone()
        for placed in both:
            missing = [unit for unit in full.units if unit not in placed.memory.weights.present]
            placed.memory.rearrange(full)
            for unit in missing:
                placed.memory.weights.fill(unit, source)
        bench.synchronize()
        for placed in both:  # KV of the layers that had left is gone: the prompt once more
            _logits(bench, placed, prompt, layers)
        restored = [_logits(bench, placed, decode, layers) for placed in both]
        after = [placed.decoder.graphs.num_captures if placed.decoder.graphs else 0 for placed in both]
        return tell(
            {
                "captures": captures,
                "captures_after_drop_and_restore": after,
                "same_tokens": same_tokens,
                "same_in_chain": bool(torch.equal(before, chained)),
                "same_after_restore": all(bool(torch.equal(before, logits)) for logits in restored),
            }
        )


def _chosen(placed: Placed, step: Step) -> Tensor:
    return launch_greedy(placed, step).on_device


def bandwidth(bench: Bench) -> float:
    """Measure bytes per second, read and written, of a large copy."""
    size = GIB // 16 if bench.is_quick else 4 * GIB
    a = torch.zeros(size, dtype=torch.uint8, device=bench.torch_device)
    b = torch.empty_like(a)
    return 2 * size / bench.seconds(lambda: b.copy_(a), 10)


def decode(bench: Bench, config: ModelConfig | None = None) -> dict[str, Any]:
    """Time a decode step by batch size, in milliseconds, over what reading its weights and KV takes at least."""
    config = config or (llama_1b() if bench.is_quick else llama_8b())
    context = 64 if bench.is_quick else CONTEXT
    per_second = bandwidth(bench)
    shape = KVShape.of(config, BLOCK_SIZE, torch.bfloat16)
    units = {unit.name: unit for unit in weight_units(config, "bfloat16")}
    weights = sum(units[n].num_bytes for n in units if n != "embed" or config.tie_embeddings)
    width = ceil_div(context + 1, BLOCK_SIZE)
    figures: dict[str, Any] = {"bandwidth_gb_per_s": per_second / 1e9}
    with bench.place(
        config, torch.bfloat16, RandomSource(), num_tokens=512, num_seqs=max(BATCHES), num_blocks=max(BATCHES) * width
    ) as (placed,):
        for batch in BATCHES:
            step = make_step([context] * batch, [1] * batch, config.vocab_size)
            kv = batch * context * shape.block_bytes // BLOCK_SIZE * config.num_layers
            floor_s = (weights + kv) / per_second
            step_s, gpu_s, host_s = _step_seconds(bench, placed, step)
            figures[str(batch)] = {
                "floor_ms": floor_s * 1e3,
                "step_ms": step_s * 1e3,
                "gpu_ms": gpu_s * 1e3,
                "host_ms": host_s * 1e3,
                "over_floor": step_s / floor_s,
                "exposed_host_share": max(0.0, 1 - gpu_s / step_s),
            }
            tell(figures)
    return figures


def _step_seconds(bench: Bench, placed: Placed, step: Step) -> tuple[float, float, float]:
    """Time one step with its planning: when each waits for the arrays of the one before; the GPU's part; the host's."""
    repeats = 5 if bench.is_quick else 30
    host: list[float] = []

    def one() -> None:
        started = time.perf_counter()
        launch_greedy(placed, step)
        host.append(time.perf_counter() - started)

    with placed.device.driver.on(placed.device.copy_in.stream):
        step_s = bench.seconds(one, repeats, warm_up=3)
        with _unthrottled(placed.decoder):
            host.clear()
            gpu_s = _gpu_seconds(bench, one, repeats)
    return step_s, gpu_s, sum(host) / len(host)


def gpu_step_seconds(bench: Bench, placed: Placed, config: ModelConfig, num_seqs: int, context: int) -> float:
    """Return the GPU's seconds for a greedy decode step of `num_seqs` sequences of `context` tokens by itself."""
    step = make_step([context] * num_seqs, [1] * num_seqs, config.vocab_size)

    def one() -> None:
        launch_greedy(placed, step)

    with placed.device.driver.on(placed.device.copy_in.stream):
        bench.seconds(one, 1)
        with _unthrottled(placed.decoder):
            return _gpu_seconds(bench, one, 5 if bench.is_quick else 30)


class _unthrottled:  # noqa: N801
    """Lets steps not wait for the arrays of the one before: they are all equal here, and may be overwritten."""

    def __init__(self, decoder: CudaDecoder) -> None:
        self._buffers = decoder._buffers

    def __enter__(self) -> None:
        self._buffers.wait_writable = lambda: None  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self._buffers.wait_writable


def _gpu_seconds(bench: Bench, work: Callable[[], None], repeats: int) -> float:
    """Return the GPU's seconds for one call, with everything queued before it begins: the host takes no part."""
    if bench.torch_device.type != "cuda":
        return bench.seconds(work, repeats)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # about a second, in cycles
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    bench.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def prefill(bench: Bench, config: ModelConfig | None = None) -> dict[str, Any]:
    """Measure TFLOP/s of a prefill step of 8192 tokens in four prompts, and of a large matrix product."""
    config = config or (llama_1b() if bench.is_quick else llama_8b())
    length, seqs = (64 if bench.is_quick else 2048), 4
    units = weight_units(config, "bfloat16")
    matrices = sum(prod(t.shape) for u in units for t in u.tensors if len(t.shape) == 2 and u.name.startswith("layers"))
    attention = 2 * config.num_layers * config.q_size * length  # both products, causal
    flops = seqs * length * (2 * matrices + attention)
    step = make_step([0] * seqs, [length] * seqs, config.vocab_size)
    num_tokens, num_blocks = seqs * length, seqs * ceil_div(length, BLOCK_SIZE)
    with (
        bench.place(
            config, torch.bfloat16, RandomSource(), num_tokens=num_tokens, num_seqs=seqs, num_blocks=num_blocks,
            enforce_eager=True,
        ) as (placed,),
        placed.device.driver.on(placed.device.copy_in.stream),
    ):  # fmt: skip
        seconds = bench.seconds(lambda: forward(placed, step, 0, config.num_layers), 5)
    n = 256 if bench.is_quick else 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device=bench.torch_device)
    matmul_s = bench.seconds(lambda: a @ a, 20)
    return {
        "tokens": seqs * length,
        "ms": seconds * 1e3,
        "tflops": flops / seconds / 1e12,
        "matmul_tflops": 2 * n**3 / matmul_s / 1e12,
        "share_of_matmul": flops / seconds / (2 * n**3 / matmul_s),
    }


def kernels(bench: Bench) -> dict[str, Any]:
    """Compare Triton's kernels with torch's on this GPU: largest error in units of the dtype's precision."""
    from kunserve.compute.cuda.ops import TorchKernels, load_kernels

    reference, device, dtype = TorchKernels(), bench.torch_device, torch.bfloat16
    fast, note = load_kernels(device)
    errors: dict[str, Any] = {"kernels": note}

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).abs().max() / b.float().abs().max() / torch.finfo(dtype).eps)

    width = 256 if bench.is_quick else 4096
    x, weight, gate_up = randn(37, width), randn(width), randn(37, 7 * width)
    errors["rms_norm"] = error(fast.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    pairs = zip(*(kernels.add_and_norm(x, x.flip(0), weight, 1e-5) for kernels in (fast, reference)), strict=True)
    errors["add_and_norm"] = max(error(a, b) for a, b in pairs)
    errors["launched_early"] = error(*(_chained(fast, x, weight, is_waiting=wait) for wait in (False, True)))
    errors["silu_and_mul"] = error(fast.act_and_mul(gate_up), reference.act_and_mul(gate_up))
    for head_dim, is_normed in ((64, False), (128, True)):
        positions = torch.tensor([0, 7, 3, 99, 5, 0], dtype=torch.int32, device=device)
        slots = torch.tensor([3, 17, 8, 0, 159, -1], dtype=torch.int32, device=device)
        rope, qkv = randn(100, head_dim), randn(6, 12 * head_dim)
        q_norm, k_norm = (randn(head_dim) if is_normed else None for _ in range(2))
        done = []
        for kernels in (fast, reference):
            q, kv = qkv.clone(), torch.zeros(10, 2, 2, 16, head_dim, dtype=dtype, device=device)
            kernels.rotate_and_append(q, rope, kv, positions, slots, q_norm, k_norm, 1e-5)
            done.append((q[:5], kv))
        errors[f"rotate_and_append {head_dim}"] = max(error(a, b) for a, b in zip(*done, strict=True))
        few = torch.zeros(10, 2, 2, 16, head_dim, dtype=torch.uint8, device=device).view(E4M3)
        fast.rotate_and_append(qkv, rope, few, positions, slots, q_norm, k_norm, 1e-5)
        differs = bits_of(few) != bits_of(as_kv(done[0][1], E4M3))
        errors[f"KV of 8 bits {head_dim}, bytes that differ"] = int(differs.sum())
    return errors


def _chained(kernels: Any, x: Tensor, weight: Tensor, *, is_waiting: bool) -> Tensor:
    """Return what many small kernels, one on the other's result, come to; with a wait between each, or without."""
    y = x
    for _ in range(200):
        _, y = kernels.add_and_norm(x, y, weight, 1e-5)
        if is_waiting and x.is_cuda:
            torch.cuda.synchronize(x.device)
        y = kernels.act_and_mul(torch.cat([y, x], dim=1))
        if is_waiting and x.is_cuda:
            torch.cuda.synchronize(x.device)
    return y


def transformers(bench: Bench) -> dict[str, Any]:
    """Compare smollm2-135m in bf16, and transformers in bf16, with transformers in float32; where both are at hand."""
    from kunserve.model.card import resolve_model
    from kunserve.model.checkpoint import open_weights

    try:
        files = resolve_model("smollm2-135m")
        from transformers import AutoModelForCausalLM
    except (ConfigError, ImportError) as error:
        return {"skipped": str(error)}
    assert files.folder is not None
    ids = list(range(1000, 1064))
    step = make_step([0], [len(ids)], files.config.vocab_size)
    step = replace(step, token_ids=torch.tensor(ids, dtype=torch.int32))
    source = open_weights(files.folder, files.config, "auto")
    with bench.place(
        files.config, torch.bfloat16, source, num_tokens=64, num_seqs=1, num_blocks=8, enforce_eager=True
    ) as (placed,):
        ours = _logits(bench, placed, step, files.config.num_layers).float().cpu()
    theirs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=dtype).to(bench.torch_device).eval()
        with torch.inference_mode():
            theirs[dtype] = model(torch.tensor([ids], device=bench.torch_device)).logits[0, -1:].float().cpu()
    expected = theirs[torch.float32]
    return {
        "relative_error": _relative_error(ours, expected),
        "transformers_relative_error": _relative_error(theirs[torch.bfloat16], expected),
    }
