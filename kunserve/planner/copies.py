"""Whether a server has anything to drop: how many copies of the weights fit at launch, and what would make it two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kunserve.planner.drop import LEAST_MERGE_GAIN, plan_drop
from kunserve.planner.snapshot import DeviceView, GroupView, Lineage, ModelShape, Snapshot, StageView
from kunserve.sizes import ceil_div, format_size

ENOUGH_BLOCKS = 1 << 60  # more than any server holds: a plan for so many merges all that can merge

# Complete copies of the weights that a launch makes of these devices, in chains of so many (None: as few as fit); 0 if
# they do not fit.
NumCopies = Callable[[ModelShape, Sequence[DeviceView], int | None], int]


def why_no_drop(
    model: ModelShape,
    devices: Sequence[DeviceView],
    groups: Sequence[Sequence[StageView]],
    devices_per_group: int | None,
    num_copies: NumCopies,
) -> str | None:
    """Say why none of the weights launched on `groups` can ever be dropped, and what would change it; None if some can.

    `devices_per_group` is what was asked for, `num_copies` what a launch would do with other devices or another model.
    """
    if len(groups) > 1:
        return _why_no_merge(model, devices, groups)
    copy = f"One copy of the weights ({format_size(_weight_bytes(model))}) fits: nothing can be dropped."
    if devices_per_group and (num := num_copies(model, devices, None)) > 1:
        return f"{copy} Without --pipeline-parallel-size {devices_per_group} these devices would hold {num} copies."
    ways = []
    if more := _devices_for_two(model, devices, devices_per_group, num_copies):
        ways.append(f"{more} devices like {'these' if len(devices) > 1 else 'this one'}")
    if most_bytes := _weights_for_two(model, devices, devices_per_group, num_copies):
        ways.append(f"these {len(devices)} with weights of at most {format_size(most_bytes)}")
    return f"{copy} Two would fit on {', or on '.join(ways)}." if ways else copy


def most_added_blocks(snapshot: Snapshot) -> int:
    """Return the blocks that a server holds more once all its groups have merged that can."""
    return sum(merge.added_blocks for merge in plan_drop(snapshot, ENOUGH_BLOCKS).merges)


def _why_no_merge(
    model: ModelShape, devices: Sequence[DeviceView], groups: Sequence[Sequence[StageView]]
) -> str | None:
    views = tuple(GroupView(i, tuple(stages), 0, Lineage(tuple(stages))) for i, stages in enumerate(groups))
    if plan_drop(Snapshot(0, model, tuple(devices), views), ENOUGH_BLOCKS).merges:
        return None
    if sum(sorted(map(len, groups))[:2]) > model.num_layers:
        return f"{model.num_layers} layers cannot be spread over the devices of two groups: nothing can be dropped."
    return (
        f"{len(groups)} copies of the weights fit, but no two groups would hold {LEAST_MERGE_GAIN:.0%} more KV as one: "
        "nothing is dropped for so little."
    )


def _devices_for_two(
    model: ModelShape, devices: Sequence[DeviceView], devices_per_group: int | None, num_copies: NumCopies
) -> int | None:
    """Return the least number of devices like the poorest of these that hold two copies.

    It is even: of an odd number, the shorter of two chains fits, so that two of its length do.
    """
    budget = min(view.budget_chunks for view in devices)
    for length in range(len(devices) // 2 + 1, len(devices) + 1):
        more = [DeviceView(i, budget) for i in range(2 * length)]
        if num_copies(model, more, devices_per_group) > 1:
            return 2 * length
    return None


def _weights_for_two(
    model: ModelShape, devices: Sequence[DeviceView], devices_per_group: int | None, num_copies: NumCopies
) -> int | None:
    """Return the bytes of the largest weights, of this model's proportions, that fit twice on these devices."""
    fitting, too_large = 0, model.layer_chunks  # chunks of a layer
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if num_copies(shrunk(model, middle), devices, devices_per_group) > 1:
            fitting = middle
        else:
            too_large = middle
    return _weight_bytes(shrunk(model, fitting)) if fitting else None


def shrunk(model: ModelShape, layer_chunks: int) -> ModelShape:
    """Return the model with layers of `layer_chunks`, and embedding and head smaller in the same proportion."""
    embed, head = (
        ceil_div(chunks * layer_chunks, model.layer_chunks) for chunks in (model.embed_chunks, model.head_chunks)
    )
    return replace(model, layer_chunks=layer_chunks, embed_chunks=embed, head_chunks=head)


def _weight_bytes(model: ModelShape) -> int:
    return model.weight_chunks(0, model.num_layers) * model.chunk_bytes
