"""A frame: everything that viewers see of a server at one moment, and how one follows from the one before.

Made from `Backend.state()`, with lists turned into objects by index or id, so that the difference between two frames
is a JSON merge patch (RFC 7396) of a few hundred bytes. As a patch says null for what is gone, no value is null.
Units: `*_s` seconds, chunks of `chunk_bytes`, blocks of `block_size` tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Frame = dict[str, Any]

NUM_TRANSITIONS = 20  # that a frame holds


def frame_of(state: Mapping[str, Any], **more: Any) -> Frame:
    """Return the frame of a state; `more` is what the engine does not know (the model's name, rates)."""
    devices = state.get("devices", ())
    return {
        **more,
        "at_s": round(state["now_s"], 3),
        "epoch": state["epoch"],
        "policy": str(state["overload_policy"] or ""),
        "num_layers": state["num_layers"],
        "block_size": state["block_size"],
        "chunk_bytes": devices[0]["chunk_bytes"],
        "units": (units := state["chunks_of_unit"]),
        "devices": {str(index): _device(device, list(units)) for index, device in enumerate(devices)},
        "groups": {str(group["id"]): _group(group) for group in state["groups"]},
        "requests": state["requests"],
        "copies": {name: value for name, value in state["copies"].items() if value is not None},
        "transitions": {_key(t): _transition(t) for t in state.get("transitions", ())},
    }


def _key(transition: Mapping[str, Any]) -> str:
    """Return what tells a transition from all others: merges of different groups begin at the same time."""
    return f"{transition['started_s']:.3f} {'+'.join(map(str, transition['old_groups']))}"


def _device(device: Mapping[str, Any], units: Sequence[str]) -> Frame:
    weights = {"units": _runs(device["weights"], units), "home": _runs(device["home"], units)}
    state = device.get("state", "ok")  # recordings of before have none
    return {"name": device["name"], "state": state, **weights, **device["chunks"], **_blocks(device["blocks"])}


def _runs(names: Collection[str], units: Sequence[str]) -> list[list[int]]:
    """Return half-open runs of indices into `units`: there are hundreds of names, but one or two runs."""
    runs: list[list[int]] = []
    for index, unit in enumerate(units):
        if unit in names:
            if runs and runs[-1][1] == index:
                runs[-1][1] += 1
            else:
                runs.append([index, index + 1])
    return runs


def _group(group: Mapping[str, Any]) -> Frame:
    return {
        "stages": [[stage["device"], *stage["layers"]] for stage in group["stages"]],
        **_blocks(group["blocks"]),
        "running": group["running"],
        "in_flight": group["microbatches_in_flight"],
    }


def _blocks(blocks: Mapping[str, int]) -> Frame:
    """Return blocks by use; `idle` ones keep the prefix cache, and are neither used nor empty."""
    return {"blocks": blocks["total"], "used": blocks["used"], "idle": blocks["idle"]}


def _transition(transition: Mapping[str, Any]) -> Frame:
    shown = {name: value for name, value in transition.items() if value is not None}
    return {**shown, "seconds": {step: round(value, 4) for step, value in transition["seconds"].items()}}


def delta_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> Frame:
    """Return the merge patch that makes `new` of `old`; empty if they are equal."""
    delta: Frame = {}
    for name, value in new.items():
        before = old.get(name)
        if value == before:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            delta[name] = delta_of(before, value)
        else:
            delta[name] = value
    for name in old.keys() - new.keys():
        delta[name] = None
    return delta


def apply(frame: Frame, delta: Mapping[str, Any]) -> None:
    """Change `frame` as `delta` says. The delta's values are copied where they would be shared."""
    for name, value in delta.items():
        if value is None:
            frame.pop(name, None)
        elif isinstance(value, Mapping):
            if not isinstance(frame.get(name), dict):
                frame[name] = {}
            apply(frame[name], value)
        else:
            frame[name] = value
