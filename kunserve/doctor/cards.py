"""The known models: how large their weights are, and whether their files are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kunserve.doctor.caches import hub_cache, server_cache
from kunserve.doctor.finding import Finding, Status, ok
from kunserve.doctor.gpus import Gpus
from kunserve.doctor.probe import Probe

FLOAT32_BYTES = 4
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Card:
    """A model card. `pinned_bytes` are its weights as GPUs take them, `float32_bytes` as CPU devices do."""

    name: str
    pinned_bytes: int
    float32_bytes: int
    is_here: bool
    hub_id: str | None


def known_cards(probe: Probe) -> list[Card]:
    """Return all cards by name. The packages that read them are imported here, as they may be broken."""
    card, layout = probe.import_module("kunserve.model.card"), probe.import_module("kunserve.model.layout")

    def weights(config: Any, item_bytes: int) -> int:
        return sum(unit.num_bytes for unit in layout.weight_units(config, item_bytes))

    loaded = [card.load_card(name) for name in card.list_cards()]
    return [
        Card(
            one.name,
            weights(one.config, ITEM_BYTES[one.config.dtype]),
            weights(one.config, FLOAT32_BYTES),
            _is_here(probe, one),
            one.hub_id,
        )
        for one in loaded
    ]


def check_models(probe: Probe, gpus: Gpus) -> Finding:
    """Which of the known models need no download."""
    cards = known_cards(probe)
    if not cards:
        consequence = "--model NAME finds no card"
        return Finding(Status.MISSING, "no model cards", consequence, "--model FOLDER, or a Hub id")
    here = [card.name for card in cards if card.is_here]
    details = {"here": here, "missing": {card.name: card.pinned_bytes for card in cards if not card.is_here}}
    text = f": {', '.join(here)}" if here else "; smollm2-135m comes from PyPI"
    return ok(f"{len(here)} of {len(cards)} are on this machine{text}", **details)


def _is_here(probe: Probe, card: Any) -> bool:
    if card.embedded is not None:
        embedded = probe.import_module("kunserve.model.embedded")
        folder = server_cache(probe) / "models" / f"{card.name}-{card.embedded.sha256[:8]}"
        return bool(embedded.is_complete(folder, card.embedded))
    if card.hub_id is None:
        return False
    has_all_files = probe.import_module("kunserve.model.folder").has_all_files
    snapshots: Path = hub_cache(probe) / f"models--{card.hub_id.replace('/', '--')}" / "snapshots"
    return any(has_all_files(snapshot) for snapshot in snapshots.glob("*"))
