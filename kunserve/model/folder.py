"""Model files: which files of a folder hold the weights, told from their names alone, and what else it may hold."""

from __future__ import annotations

from pathlib import Path

from kunserve.errors import ConfigError
from kunserve.model.hf_config import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
GGUF_ADVICE = (
    "GGUF is not served. Take the model that they were made from, in safetensors "
    "(for instance hf download ORGANIZATION/MODEL), and give its folder"
)


def check_weight_files(folder: Path) -> None:
    """Raise ConfigError if a folder has no safetensors weights; it says what to do about those that it has."""
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return
    names = sorted(path.name for path in folder.iterdir())
    if gguf := [name for name in names if is_gguf(name)]:
        raise ConfigError(f"{folder} holds GGUF files ({_first(gguf)}): {GGUF_ADVICE}")
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise ConfigError(
            f"{folder} holds pickled weights ({_first(pickles)}), which are not read: a pickle can run any code. "
            "Take the model's safetensors, or convert: transformers' from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    if other := [name for name in names if name.endswith(".safetensors")]:
        raise ConfigError(
            f"{folder} holds {_first(other)}, but neither {SINGLE_FILE} nor {INDEX_FILE}: "
            "its download is not complete, or it is no Hugging Face model"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder's weights. ConfigError if there are none or the index is broken."""
    single = folder / SINGLE_FILE
    return [single] if single.exists() else sorted(set(indexed_files(folder).values()))


def indexed_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor, as the index of a sharded checkpoint says. ConfigError if it has none."""
    index = folder / INDEX_FILE
    if not index.exists():
        raise ConfigError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConfigError(f"{index} has no weight_map")
    return {name: folder / str(file) for name, file in weight_map.items()}


def has_all_files(folder: Path) -> bool:
    """Return whether all files of the weights are there; their content is checked when they are opened."""
    try:
        return all(path.exists() for path in weight_files(folder))
    except ConfigError:
        return False


def is_gguf(name: str) -> bool:
    """Return whether a file is GGUF by its name."""
    return name.lower().endswith(".gguf")


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
