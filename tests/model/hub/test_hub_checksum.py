import hashlib
import os
from pathlib import Path

import pytest

from kunserve.model.hub.checksum import damaged_files


def put(cache: Path, name: str, content: bytes, blob: str) -> Path:
    """Store a blob as the Hub's cache does, and link a file of the snapshot to it."""
    (cache / "blobs" / blob).write_bytes(content)
    path = cache / "snapshot" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(cache / "blobs" / blob, path.parent))
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    return tmp_path


def test_only_files_that_are_not_what_they_are_named_by_are_damaged(cache: Path) -> None:
    put(cache, "good.safetensors", b"good" * 10, sha256(b"good" * 10))
    bad = put(cache, "bad.safetensors", b"bad" * 20, sha256(b"what it should be"))
    worse = put(cache, "folder/worse.safetensors", b"", sha256(b"not empty"))
    put(cache, "config.json", b"{}", "1" * 40)  # the name of git
    (cache / "snapshot" / "copy.safetensors").write_bytes(b"from a file system without links")
    shares: list[float] = []
    assert damaged_files(cache / "snapshot", shares.append) == [bad, worse]
    assert shares[0] == 0.0 and shares[-1] == 1.0 and shares == sorted(shares)


def test_a_blob_in_a_store_that_names_it_otherwise_is_checked_by_its_name_in_the_repository(cache: Path) -> None:
    content = b"shared by two repositories"
    path = put(cache, "model.safetensors", b"", sha256(content))
    blob = cache / "blobs" / sha256(content)
    blob.unlink()
    (cache / ("f" * 64)).write_bytes(content)
    blob.symlink_to(cache / ("f" * 64))
    assert damaged_files(cache / "snapshot", lambda share: None) == []
    (cache / ("f" * 64)).write_bytes(content[::-1])
    assert damaged_files(cache / "snapshot", lambda share: None) == [path]


def test_nothing_to_check_is_no_damage(cache: Path) -> None:
    assert damaged_files(cache / "snapshot", lambda share: None) == []
    put(cache, "empty.safetensors", b"", sha256(b""))
    assert damaged_files(cache / "snapshot", lambda share: None) == []
