"""What a server process takes of the machine's memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def pool_bytes(pid: int) -> list[int]:
    """Sizes of the memory files that a process has open: one per device."""
    files = [path for path in Path(f"/proc/{pid}/fd").iterdir() if "memfd:kunserve" in str(path.readlink())]
    return [path.stat().st_size for path in files]


def resident_bytes_beside_pools(pid: int) -> int:
    """Resident memory of a process, less the devices' pools and the mapped weights file."""
    total, is_counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping: its addresses come first, its file last
            is_counted = "memfd:kunserve" not in line and not line.endswith(".safetensors")
        elif words[0] == "Rss:" and is_counted:
            total += int(words[1]) << 10
    return total
