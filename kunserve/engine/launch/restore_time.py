"""How long weights would take to come back after a drop: measured once, before anybody is served."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from kunserve.engine.regroup.weight_loader import WeightLoader
from kunserve.gpu.device_memory import DeviceMemory
from kunserve.gpu.links import Links
from kunserve.gpu.queue import gather_all


async def measure_restore(
    memories: Sequence[DeviceMemory], loader: WeightLoader, dropped: Mapping[int, Sequence[str]]
) -> float:
    """Return the seconds in which devices would load the units that they would drop.

    Each fills one of them again, all at once as in a restore, and from where a restore would fill it; the slowest
    counts. No device may compute meanwhile.
    """

    async def measure(device: int, units: Sequence[str]) -> float:
        sample = min(units, key=memories[device].weights.num_tensor_bytes)
        started = time.perf_counter()
        await loader.load(device, sample, Links())
        seconds = time.perf_counter() - started
        num_bytes = {unit: memories[device].weights.num_tensor_bytes(unit) for unit in units}
        return seconds * sum(num_bytes.values()) / num_bytes[sample]

    return max(await gather_all(measure(device, units) for device, units in dropped.items()))
