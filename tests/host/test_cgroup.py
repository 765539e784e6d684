"""Limits of containers: what they leave of cores and memory, in both versions of control groups."""

from __future__ import annotations

from collections.abc import Mapping

from kunserve.host.cgroup import ReadText, available_bytes, core_quota, memory_left


def reader_of(contents: Mapping[str, str]) -> ReadText:
    """Return what reads these files, and no others."""

    def read_text(path: str) -> str:
        if path not in contents:
            raise FileNotFoundError(path)
        return contents[path]

    return read_text


def test_limits_of_groups_around_ours_count_in_both_versions() -> None:
    two = {
        "/proc/self/cgroup": "0::/system.slice/kunserve.service\n",
        "/sys/fs/cgroup/system.slice/kunserve.service/memory.max": "max\n",
        "/sys/fs/cgroup/system.slice/kunserve.service/memory.current": "5\n",
        "/sys/fs/cgroup/system.slice/memory.max": "1000\n",
        "/sys/fs/cgroup/system.slice/memory.current": "400\n",
        "/sys/fs/cgroup/system.slice/kunserve.service/cpu.max": "max 100000\n",
    }
    one = {
        "/proc/self/cgroup": "4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1500\n",
        "/sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 300\n",
        "/sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "-1\n",
        "/sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    unlimited = {**one, "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    machines = [reader_of(contents) for contents in (two, one, unlimited, {})]
    assert [memory_left(read_text) for read_text in machines] == [600, 800, None, None]
    assert [core_quota(read_text) for read_text in machines] == [None, 0.5, 0.5, None]


def test_a_device_may_take_what_the_machine_has_and_the_container_leaves() -> None:
    machine = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n", "/proc/self/cgroup": "0::/\n"}
    container = {"/sys/fs/cgroup/memory.max": "1000000\n", "/sys/fs/cgroup/memory.current": "400000\n"}
    assert available_bytes(reader_of(machine)) == 8000 << 10
    assert available_bytes(reader_of(machine | container)) == 600_000
    assert available_bytes(reader_of(machine | container | {"/proc/meminfo": "MemAvailable: 100 kB\n"})) == 100 << 10
    assert available_bytes() > 0
