from __future__ import annotations

import copy
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st
from states import drop_transition, gone, state

from kunserve.observe.frame import apply, delta_of, frame_of

VALUES = st.recursive(
    st.integers(0, 2) | st.text("ab", max_size=2) | st.lists(st.integers(0, 2), max_size=2),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=8,
)
FRAMES = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


@given(FRAMES, FRAMES)
def test_a_delta_makes_the_new_frame_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    frame, wanted = copy.deepcopy(old), copy.deepcopy(new)
    delta = orjson.loads(orjson.dumps(delta_of(old, new)))
    apply(frame, delta)
    assert frame == wanted
    assert (delta == {}) is (old == new)


def test_a_frame_of_a_drop() -> None:
    frame = frame_of(state(is_dropped=True, used=40, idle=8), model="m")
    assert frame["devices"]["0"] | {"name": ""} == {
        "name": "",
        "state": "ok",
        "units": [[0, 3]],
        "home": [[0, 6]],
        "budget": 30,
        "weights": 7,
        "kv": 21,
        "free": 2,
        "blocks": 64,
        "used": 40,
        "idle": 8,
    }
    assert frame["devices"]["1"]["units"] == [[3, 6]]
    assert frame["groups"]["2"]["stages"] == [["cpu:0", 0, 2], ["cpu:1", 2, 4]]
    [drop] = frame["transitions"].values()
    assert "exchange_mode" not in drop  # no value is null
    assert drop["seconds"]["boundary"] == 0.0123
    assert frame["copies"] == {"now": 1, "at_launch": 2}


def test_a_device_that_is_lost_stays_in_the_frame_and_holds_nothing() -> None:
    before = frame_of(state(1.0))
    lose = drop_transition() | {"kind": "lose", "old_groups": (1,), "new_groups": ()}
    after = frame_of(gone(state(2.0, transitions=[lose]), 1))
    assert after["devices"]["0"] == before["devices"]["0"]
    lost = after["devices"]["1"]
    assert (lost["name"], lost["state"]) == ("cpu:1", "lost")
    assert {lost[name] for name in ("weights", "kv", "free", "blocks", "used", "idle")} == {0}
    assert lost["units"] == [] and list(after["groups"]) == ["0"]
    [shown] = after["transitions"].values()
    assert (shown["kind"], list(shown["new_groups"])) == ("lose", [])
    frame = copy.deepcopy(before)
    apply(frame, delta_of(before, after))
    assert frame == after
    assert frame_of(gone(gone(state(2.0), 0), 1, "removed"))["groups"] == {}


def test_merges_that_begin_at_the_same_time_are_told_apart() -> None:
    [drop] = (before := state(is_dropped=True))["transitions"]
    before["transitions"] = [drop, drop | {"old_groups": (7, 8)}]
    shown = frame_of(before)["transitions"].values()
    assert [list(transition["old_groups"]) for transition in shown] == [list(drop["old_groups"]), [7, 8]]


def test_a_step_is_small() -> None:
    before, after = frame_of(state(1.0, used=3)), frame_of(state(1.1, used=4))
    used = {"0": {"used": 4}, "1": {"used": 4}}
    assert delta_of(before, after) == {"at_s": 1.1, "devices": used, "groups": used}
