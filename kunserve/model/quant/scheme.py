"""How a safetensors checkpoint is quantized: what its `quantization_config` says, as a value. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config_fields import read_flag, read_names, read_object, show
from kunserve.model.quant.blocks import GGML_BLOCKS, GROUPS, OUR_BLOCKS, Blocks

# What is read of each matrix, by its ending; of "fp8" either of two scales.
ENDINGS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
    "pack-quantized": ("weight_packed", "weight_scale"),
    "int-quantized": ("weight", "weight_scale"),
    "float-quantized": ("weight", "weight_scale"),
    "fp8": ("weight",),
    "mxfp4": ("_blocks", "_scales"),
}
# vLLM's names of ways to run them, which mean nothing else here.
SAME_METHODS = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
METHODS = ("awq", "gptq", "compressed-tensors", "fp8", "mxfp4")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way of storing all quantized matrices of a checkpoint."""

    layout: str  # "awq", "gptq", "pack-quantized", "int-quantized", "float-quantized", "fp8", "mxfp4"; "numbers"
    kind: str  # of codes: "A4", "A8", "F8", as our blocks are named; "MXFP4"
    group: int | None  # columns that share a scale; None: a whole row, or the whole matrix
    skipped: tuple[str, ...] = ()  # parts of the names of matrices that are not quantized; * stands for anything
    dynamic: tuple[str, ...] = ()  # expressions for names, of which the first that fits counts; "-:...": not quantized
    zero_shift: int = 0  # what is added to stored zero points
    is_ordered: bool = True  # False: which group a column is of is stored (GPTQ's act-order)
    has_zeros: bool = False  # compressed-tensors: zero points are stored; else codes lie around their middle
    scale_rows: int = 1  # that share a scale of floats

    @property
    def is_made(self) -> bool:
        """Say whether the checkpoint holds numbers, which are quantized as they are read."""
        return self.layout == "numbers"

    @property
    def method(self) -> str:
        """Return the checkpoint's `quant_method`."""
        return self.layout if self.layout in METHODS else "compressed-tensors"

    def blocks_of(self, num_columns: int) -> Blocks | None:
        """Return the blocks that a matrix is kept in without loss; None if it can only be kept as numbers."""
        if not self.is_ordered:
            return None
        if self.layout == "mxfp4":
            return GGML_BLOCKS[self.kind]
        group = self.group or num_columns
        size = next((size for size in GROUPS if group % size == 0 and num_columns % size == 0), None)
        return None if size is None else OUR_BLOCKS[f"{self.kind}_{size}"]

    def skips(self, *names: str) -> bool:
        """Tell whether a matrix ("model.layers.0.mlp.up_proj") is stored as numbers; names: that it may have."""
        expressions = ((part, part.removeprefix("-:").removeprefix("+:")) for part in self.dynamic)
        fits = (part for part, expression in expressions if any(re.match(expression, one) for one in names))
        return (
            "lm_head" in names
            or next(fits, "").startswith("-:")
            or any(_is_part(part, f".{one}.") for part in self.skipped for one in names)
        )

    def holds(self, name: str, num_dims: int) -> bool:
        """Say whether a tensor is of those that this way of storing is for: experts in one tensor have 3 dimensions.

        Embeddings, head, routers, gates, norms and biases are none of them.
        """
        if num_dims == 3:
            return self.layout in ("mxfp4", "numbers")
        return (
            num_dims == 2
            and self.layout != "mxfp4"
            and name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))
        )


FP8_OF_NUMBERS = Scheme("numbers", "F8", None)  # a scale for each row, which is an output


def scheme_of(values: Mapping[str, Any]) -> Scheme:
    """Read a `quantization_config`. ConfigError, which names what is not served, for any other."""
    method = values.get("quant_method")
    match method:
        case "awq":
            _want(values, "version", ("gemm", "GEMM"), "gemm")
            return Scheme("awq", _kind(values, "bits", (4,)), _group(values, "group_size"), _names(values))
        case "gptq":
            is_v2 = values.get("checkpoint_format", "gptq") == "gptq_v2"
            _want(values, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
            kind, group = _kind(values, "bits", (4, 8)), _group(values, "group_size")
            ordered = not read_flag(values, "desc_act")
            names, dynamic = _names(values), _dynamic(values)
            return Scheme("gptq", kind, group, names, dynamic, zero_shift=0 if is_v2 else 1, is_ordered=ordered)
        case "compressed-tensors":
            return _compressed(values)
        case "fp8":
            _want(values, "fmt", ("e4m3",), "e4m3")
            size = values.get("weight_block_size")
            if size is not None and size != [128, 128]:
                raise ConfigError(f"weight_block_size {show(size)} is not served, only [128, 128]")
            return Scheme("fp8", "F8", 128 if size else None, _names(values), scale_rows=128 if size else 1)
        case "mxfp4":
            return Scheme("mxfp4", "MXFP4", 32, _names(values))
    raise ConfigError(f"weights quantized with {show(method)} are not served, only {', '.join(METHODS)} and GGUF files")


def _is_part(part: str, dotted: str) -> bool:
    return fnmatchcase(dotted, f"*.{part}.*") if "*" in part else f".{part}." in dotted


def _compressed(values: Mapping[str, Any]) -> Scheme:
    layout, groups = values.get("format"), values.get("config_groups")
    if layout not in ("pack-quantized", "int-quantized", "float-quantized"):
        raise ConfigError(f"compressed-tensors of format {show(layout)} are not served")
    if any(read_object(values, "transform_config").values()):  # {"config_groups": {}} stands for none, too
        raise ConfigError("compressed-tensors with a transform_config (rotations) are not served: take one without")
    if (sparsity := read_object(values, "sparsity_config").get("format") or "dense") != "dense":
        raise ConfigError(f"compressed-tensors that are stored as {show(sparsity)} are not served: take a dense one")
    found: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    if len(found) != 1 or not isinstance(found[0], dict) or not isinstance(found[0].get("weights"), dict):
        raise ConfigError("compressed-tensors are served with one group of layers, not more or none")
    how: dict[str, Any] = found[0]["weights"]
    is_float = layout == "float-quantized"
    kind = _kind(how, "num_bits", (8,) if is_float else (4, 8))
    if (of := how.get("type") or ("float" if is_float else "int")) != ("float" if is_float else "int"):
        raise ConfigError(f"compressed-tensors of format {layout} with type {show(of)} are not served")
    if layout != "pack-quantized":  # each code has a byte
        kind = "F8" if is_float else "A8"
    if (order := how.get("actorder")) not in (None, "weight", "static", "group", "dynamic"):
        raise ConfigError(f"compressed-tensors with actorder {show(order)} are not served")
    strategy, has_zeros = how.get("strategy"), how.get("symmetric") is False
    if strategy not in ("group", "channel", "tensor", "block") or (strategy == "block" and kind != "F8"):
        raise ConfigError(f"compressed-tensors with a scale per {show(strategy)} are not served")
    if has_zeros and (kind == "F8" or strategy == "tensor"):
        raise ConfigError("compressed-tensors with zero points are served of integers with scales per group or channel")
    rows, group = 1, _group(how, "group_size") if strategy == "group" else None
    if strategy == "block":
        rows, group = _block(how)
    return Scheme(
        layout,
        kind,
        group,
        tuple(name for name in read_names(values, "ignore") if not name.startswith("re:")),
        _matched(values, found[0]),
        is_ordered=order not in ("group", "dynamic"),
        has_zeros=has_zeros,
        scale_rows=rows,
    )


def _block(how: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    block = how.get("block_structure")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise ConfigError(f"field block_structure: expected two numbers, not {show(block)}")
    return block[0], block[1]


def _matched(values: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return expressions, as of `Scheme.dynamic`, for what compressed-tensors ignore and for what they are of."""
    skipped = [name for name in read_names(values, "ignore") if name.startswith("re:")]
    targets = read_names(group, "targets")
    expressions = [f"-:{name.removeprefix('re:')}" for name in skipped]
    if targets and "Linear" not in targets:  # the class of all
        of_names = (t.removeprefix("re:") if t.startswith("re:") else f"{re.escape(t)}$" for t in targets)
        expressions += [*(f"+:{expression}" for expression in of_names), "-:"]
    return _expressions("ignore or targets", expressions)


def _want(values: Mapping[str, Any], field: str, known: tuple[str, ...], default: str) -> None:
    if (value := values.get(field) or default) not in known:
        raise ConfigError(f"{field} {show(value)} is not served, only {known[0]}")


def _kind(values: Mapping[str, Any], field: str, known: tuple[int, ...]) -> str:
    bits = values.get(field)
    if type(bits) is not int or bits not in known:
        raise ConfigError(f"weights of {show(bits)} bits are not served, only of {' or '.join(map(str, known))}")
    return f"A{bits}"


def _group(values: Mapping[str, Any], field: str) -> int | None:
    """Return the columns of a group; -1 in files stands for all."""
    size = values.get(field)
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise ConfigError(f"field {field}: expected a number of columns, not {show(size)}")
    return None if size == -1 else size


def _dynamic(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what GPTQModel says of single matrices; how they are stored otherwise, their tensors' shapes tell."""
    return _expressions("dynamic", read_object(values, "dynamic"))


def _expressions(field: str, expressions: Iterable[str]) -> tuple[str, ...]:
    """Return expressions. ConfigError for one that is none."""
    for expression in (found := tuple(expressions)):
        try:
            re.compile(expression.removeprefix("-:").removeprefix("+:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"field {field}: {show(expression)} is no expression: {show(str(error))}") from None
    return found


def _names(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(read_names(values, "modules_to_not_convert") or read_names(values, "ignored_layers"))
