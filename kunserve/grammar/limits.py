"""What one structure may take, and the error of those that cannot be used."""

from __future__ import annotations

CPU_S = 1.0  # to compile
TOKEN_CPU_S = 0.25  # for each token of each request: others may share a step with it
MEMORY_BYTES = 256 << 20  # beyond what its process shares with the fork server
DEATH_REASONS = ("killed", "crash", "cpu", "hung", "refused")  # why a structure's process can end, for logs and metrics


class RefusedError(Exception):
    """A structure cannot be used; the text says why."""
