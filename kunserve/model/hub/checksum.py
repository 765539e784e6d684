"""Model files: whether the files of a snapshot are what the Hub names them by."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_THREADS = 8  # a disk seldom gives more than these hash


def damaged_files(folder: Path, on_share: Callable[[float], None]) -> list[Path]:
    """Return the large files of a snapshot whose SHA-256 is not their blob's name, sorted.

    In the Hub's cache a snapshot is links to blobs, and a blob of Git LFS is named by its SHA-256. Small files have
    other names, and a cache on a file system without links has none: these are not checked. `on_share` gets the share
    of bytes that are read. Raises OSError on a file that cannot be read.
    """
    blobs = {path: name for path in sorted(folder.rglob("*")) if (name := _sha256_of_link(path))}
    sizes = {path: path.stat().st_size for path in blobs}
    done, total = 0, sum(sizes.values())
    damaged = []
    on_share(0.0)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:  # hashing frees the GIL
        largest_first = sorted(blobs, key=lambda path: -sizes[path])
        hashes = {pool.submit(_sha256, path): path for path in largest_first}
        for future in as_completed(hashes):
            path = hashes[future]
            if future.result() != blobs[path]:
                damaged.append(path)
            done += sizes[path]
            on_share(done / total if total else 1.0)
    return sorted(damaged)


def _sha256_of_link(path: Path) -> str | None:
    """Return the name of the blob that `path` links to, if it is a SHA-256."""
    if not path.is_symlink():
        return None
    name = path.readlink().name  # not resolve(): a blob may be a link itself, to a store that names it otherwise
    return name if SHA256.fullmatch(name) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
