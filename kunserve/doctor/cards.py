"""The known models: how large their weights are, and whether their files are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kunserve.doctor.caches import hub_cache
from kunserve.doctor.finding import Finding, Status, first_line, ok
from kunserve.doctor.gpus import Gpus
from kunserve.doctor.probe import Probe


@dataclass(frozen=True, slots=True)
class Card:
    """A model card. `pinned_bytes` are its weights as GPUs take them, `float32_bytes` as CPU devices do."""

    name: str
    pinned_bytes: int
    float32_bytes: int
    is_here: bool
    hub_id: str | None


def known_cards(probe: Probe) -> tuple[list[Card], dict[str, str]]:
    """Return all cards by name, and what is wrong with those that cannot be read.

    The packages that read them are imported here, as they may be broken.
    """
    card, layout = probe.import_module("kunserve.model.card"), probe.import_module("kunserve.model.layout")

    def weights(config: Any, dtype: str) -> int:
        return sum(unit.num_bytes for unit in layout.weight_units(config, dtype))

    cards, broken = [], {}
    for name in card.list_cards():
        try:
            one = card.load_card(name)
            pinned_bytes, float32_bytes = weights(one.config, one.config.dtype), weights(one.config, "float32")
        except Exception as error:  # what users write can be wrong in any way; the other cards are still right
            broken[name] = first_line(error)
        else:
            cards.append(Card(name, pinned_bytes, float32_bytes, _is_here(probe, one), one.hub_id))
    return cards, broken


def check_models(probe: Probe, gpus: Gpus) -> Finding:
    """Return which of the known models need no download."""
    cards, broken = known_cards(probe)
    if not cards and not broken:
        consequence = "--model NAME finds no card"
        return Finding(Status.MISSING, "no model cards", consequence, "--model FOLDER, or a Hub id")
    here = [card.name for card in cards if card.is_here]
    details: dict[str, Any] = {
        "broken": broken,
        "here": here,
        "missing": {card.name: card.pinned_bytes for card in cards if not card.is_here},
    }
    text = f": {', '.join(here)}" if here else "; smollm2-135m comes from PyPI"
    if broken:
        found = "; ".join(broken.values())
        remedy = "mend or remove the named file"
        return Finding(Status.WARNING, found, f"no server of {', '.join(broken)} starts", remedy, details=details)
    return ok(f"{len(here)} of {len(cards)} are on this machine{text}", **details)


def _is_here(probe: Probe, card: Any) -> bool:
    """Tell whether a card's files are on this machine. What may not be read, or cannot be looked for, is not."""
    try:
        return _has_files(probe, card)
    except Exception:  # the checks of the caches say what is wrong with a folder, or with the Hub's library
        return False


def _has_files(probe: Probe, card: Any) -> bool:
    if card.embedded is not None:
        embedded = probe.import_module("kunserve.model.embedded")
        folder = probe.cache_root() / "models" / f"{card.name}-{card.embedded.sha256[:8]}"
        return bool(embedded.is_complete(folder, card.embedded))
    if card.hub_id is None:
        return False
    has_all_files = probe.import_module("kunserve.model.folder").has_all_files
    snapshots: Path = hub_cache(probe) / f"models--{card.hub_id.replace('/', '--')}" / "snapshots"
    return any(has_all_files(snapshot) for snapshot in snapshots.glob("*"))
