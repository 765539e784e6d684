"""Where the constants of the cost model come from: a file per model, a table per kind of device.

Looked for in this order: `costs/MODEL.toml` in the cache folder (written by scripts/bench/fit_cost_model.py on this
machine), `models/costs/MODEL.toml` (comes with KunServe), and for a model or device that nobody measured they are
derived from the device's rates in `models/costs/devices.toml`. That is how a server begins: its own steps correct
them (engine/step/own_steps.py).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.card import CARDS, cache_root
from kunserve.model.config import ModelConfig
from kunserve.model.layout import weight_units
from kunserve.model.quant.formats import NO_BLOCKS
from kunserve.planner.cost import CostModel

COSTS = CARDS / "costs"
DEFAULT_GPU = "a800"  # where a GPU's own rates are not known: what matters are ratios, and those are alike
OVERLAP = 4.0  # assumed where nothing is measured: reading weights hides behind multiplying but for the knee


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What one device can do, and the share of it that is reached."""

    source: str
    flops_per_s: float
    bytes_per_s: float
    element_bytes: int  # of weights and KV
    matrix_share: float
    attention_share: float
    memory_share: float
    stage_s: float  # launching a stage


def cost_model(model: str, config: ModelConfig, kind: str, cache: Path | None = None) -> tuple[CostModel, str]:
    """Return the constants of `model` on devices of `kind` ("cpu", "h100"), and where they come from.

    Raises ConfigError, naming the file, if one that is found is not right.
    """
    for path in (cost_file(model, cost_folder(cache)), cost_file(model, COSTS)):
        table = _read(path).get(kind)
        if table is None:
            continue
        try:
            return CostModel.from_dict({k: v for k, v in table.items() if k != "source"}), str(table.get("source"))
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}, table {kind}: {error}") from None
    rates = device_rates()
    found = rates.get(kind) or rates[DEFAULT_GPU]
    return derive(config, found), f"derived: {found.source}"


def cost_folder(cache: Path | None = None) -> Path:
    """Return the folder for constants that were measured on this machine."""
    return (cache or cache_root()) / "costs"


def cost_file(model: str, folder: Path) -> Path:
    """Return the file of a model's constants, for all kinds of devices."""
    return folder / f"{model.replace('/', '--')}.toml"


def device_rates() -> dict[str, DeviceRates]:
    """Read the rates of all kinds of devices that we know."""
    return {kind: DeviceRates(**table) for kind, table in _read(COSTS / "devices.toml").items()}


def device_kind(name: str) -> str:
    """Tell the kind of a device by its name: "NVIDIA H100 80GB HBM3" is "h100", "cpu:0" is "cpu"."""
    words = name.lower().replace("-", " ").replace(":", " ").split()
    return next((kind for kind in device_rates() if kind in words), DEFAULT_GPU)


def derive(config: ModelConfig, rates: DeviceRates) -> CostModel:
    """Derive constants from a device's rates: operations or bytes by what is reached of the peak.

    A token goes through the experts that are chosen for it; a microbatch is taken to read all of them, as full ones do:
    of a few tokens by themselves, that predicts too long a time.
    """
    flops_per_s = rates.flops_per_s * rates.matrix_share
    bytes_per_s = rates.bytes_per_s * rates.memory_share
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    experts, mlp = config.experts, 3 * config.hidden_size
    layer = attention + mlp * (experts.active_size if experts else config.intermediate_size)
    held = attention + mlp * (experts.held_size if experts else config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    size = rates.element_bytes
    stored = _stored_share(config, "bfloat16" if size == 2 else "float32")
    return CostModel(
        pair_s=4 * config.q_size / (rates.flops_per_s * rates.attention_share),
        key_s=2 * config.kv_size * size / bytes_per_s,
        token_s=2 * layer / flops_per_s,
        chunk_s=0.0,
        load_s=held * size * stored["layers.0"] / bytes_per_s,
        embed_token_s=2 * config.hidden_size * size / bytes_per_s,
        head_row_s=2 * head / flops_per_s,
        head_load_s=head * size * stored["embed" if config.tie_embeddings else "head"] / bytes_per_s,
        stage_s=rates.stage_s,
        sample_s=16 * config.vocab_size / bytes_per_s,  # logits in float32, read and written twice
        overlap=OVERLAP,
    )


def _stored_share(config: ModelConfig, dtype: str) -> dict[str, float]:
    """Return the bytes that units take, as a share of what they would take as numbers: less where they are blocks."""
    numbers = weight_units(replace(config, formats=NO_BLOCKS), dtype)
    stored = weight_units(config, dtype)
    return {unit.name: kept.num_bytes / unit.num_bytes for unit, kept in zip(numbers, stored, strict=True)}


def write_costs(path: Path, kind: str, cost: CostModel, source: str) -> None:
    """Put the constants of one kind of device into a model's file; its other tables stay."""
    tables = _read(path) | {kind: {"source": source, **cost.to_dict()}}
    lines = ["# Constants of the cost model (kunserve/planner/cost.py) by kind of device, in seconds."]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        for key, value in table.items():
            lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value:.6g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file; none if there is no file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
