"""Model files: a Hub id -> its snapshot in the Hub's cache on this machine, complete and checked.

The library `huggingface_hub` downloads. It compares sizes alone, so we hash what it has fetched, once: a marker in the
cache, which is there before the first byte comes and goes after the check, keeps the next start from trusting files
of a process that has died in between.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from kunserve.errors import ConfigError
from kunserve.model.file_lock import file_lock
from kunserve.model.folder import has_all_files
from kunserve.model.hub.checksum import damaged_files
from kunserve.model.hub.error import explain, is_disk_full
from kunserve.model.hub.progress import DownloadProgress
from kunserve.progress import Progress
from kunserve.sizes import format_size

SUFFIXES = (".json", ".safetensors", ".jinja")
HUB_FILES: dict[str, Any] = {
    "allow_patterns": [f"*{suffix}" for suffix in SUFFIXES],
    "ignore_patterns": ["original/*", "consolidated*"],  # the same weights once more, in the maker's own format
}
UNCHECKED = "kunserve-unchecked"
LOCK = "kunserve.lock"
AGAIN = "start again to fetch the rest (files that are complete are kept)"


def hub_folder(hub_id: str, progress: Progress = lambda text, share: None) -> Path:
    """Return the snapshot of a Hub model, downloading it when this machine lacks it.

    What is complete needs no network. Safe when several processes ask at once: one downloads, the others wait for it.
    Raises ConfigError, one line that says what is wrong and what to do.
    """
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ConfigError(f"no model {hub_id!r}: {str(error).splitlines()[0]}") from None
    cache = Path(constants.HF_HUB_CACHE).resolve()
    name = repo_folder_name(repo_id=hub_id, repo_type="model")
    marker = cache / name / UNCHECKED
    folder = _local_snapshot(hub_id)
    if folder is not None and not marker.exists():
        return folder
    if folder is None and constants.HF_HUB_OFFLINE:
        missing = f"the weights of {hub_id} are not on this machine (in {cache}), and HF_HUB_OFFLINE is set"
        raise ConfigError(f"{missing}; get them with `hf download {hub_id}` where {constants.ENDPOINT} can be reached")
    try:
        lock = cache / ".locks" / name / LOCK
        lock.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(lock, lambda: progress(f"another process downloads {hub_id}: waiting for it", 0.0)):
            folder = _local_snapshot(hub_id)  # of that other process, perhaps
            if folder is None:
                folder = _Download(hub_id, cache, marker, progress).run()
            if marker.exists():
                _check(hub_id, folder, progress)
                marker.unlink()
            return folder
    except OSError as error:
        raise ConfigError(explain(error, hub_id)) from None


def _local_snapshot(hub_id: str) -> Path | None:
    """Return the snapshot that the cache holds; None if files are missing, as after an interrupted download."""
    try:
        folder = Path(snapshot_download(hub_id, **HUB_FILES, local_files_only=True))
    except OSError:
        return None

    # The library leaves links to files that are not there any more, and may take them for present.
    is_whole = all(path.exists() for path in folder.iterdir() if path.suffix in SUFFIXES)
    return folder if is_whole and has_all_files(folder) else None


class _Download:
    """One download of a model into the cache. The caller holds the lock."""

    def __init__(self, hub_id: str, cache: Path, marker: Path, progress: Progress) -> None:
        self._hub_id, self._cache, self._marker = hub_id, cache, marker
        self._progress = progress

    def run(self) -> Path:
        """Return the snapshot's folder, with the marker set: nobody has checked it. Raises ConfigError."""
        with DownloadProgress(self._hub_id, self._progress) as shown:
            files = self._plan(shown)
            shown.expect(sum(file.file_size or 0 for file in files if file.will_download))
            try:
                self._marker.parent.mkdir(parents=True, exist_ok=True)
                self._marker.touch()
                return Path(snapshot_download(self._hub_id, **HUB_FILES, tqdm_class=shown.bar_class))
            except Exception as error:  # the library's errors have no common base
                if is_disk_full(error):
                    left = sum(file.file_size or 0 for file in files if not Path(file.local_path).exists())
                    raise ConfigError(self._too_little_room(left)) from None
                raise ConfigError(explain(error, self._hub_id, AGAIN)) from None

    def _plan(self, shown: DownloadProgress) -> list[Any]:
        """Ask the Hub which files there are, and make sure before the first byte that they are of use and fit."""
        try:
            # The library's own first request waits for ever at a firewall that drops what it does not let through.
            HfApi().model_info(self._hub_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            files: list[Any] = snapshot_download(self._hub_id, **HUB_FILES, dry_run=True, tqdm_class=shown.bar_class)
        except Exception as error:
            raise ConfigError(explain(error, self._hub_id)) from None
        if not any(file.filename.endswith(".safetensors") for file in files):
            raise ConfigError(f"{self._hub_id} has no safetensors files: weights in other formats are not read")
        needed = sum(file.file_size or 0 for file in files if file.will_download)
        if needed > self._free_bytes():
            raise ConfigError(self._too_little_room(needed))
        return files

    def _too_little_room(self, needed: int) -> str:
        needs = f"{self._hub_id} needs {format_size(needed)} more in {self._cache}"
        return f"{needs}, whose disk has {format_size(self._free_bytes())} free: make room, or set HF_HOME to another"

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._cache).free


def _check(hub_id: str, folder: Path, progress: Progress) -> None:
    """Hash what has come, and delete what is damaged. Raises ConfigError that names those files."""
    damaged = damaged_files(folder, lambda share: progress(f"checking {hub_id}", share))
    for path in damaged:
        path.resolve().unlink(missing_ok=True)  # two files with the same content are one blob
    if damaged:
        names = ", ".join(str(path.relative_to(folder)) for path in damaged)
        what = f"{hub_id}: wrong checksum of {names}, damaged on its way or on this disk and deleted now"
        raise ConfigError(f"{what}; start again to fetch it once more")
