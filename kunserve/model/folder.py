"""Model files: which files of a folder hold the weights, whether they are whole, and what else it may hold.

Weights are judged before they are loaded, by names, sizes and headers: that takes milliseconds and no torch.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.files import reading
from kunserve.model.hf_config import read_json
from kunserve.model.safetensors_header import check_whole

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SAFETENSORS = re.compile(r"[^/\x00-\x1f]+\.safetensors")
GGUF_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TRAINING_FILES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")
SENTENCE_PIECE_FILES = ("tokenizer.model", "spiece.model")
OTHER_TOKENIZERS = ("tekken.json", "vocab.json")
NUM_SHOWN = 4


def check_weight_files(folder: Path) -> None:
    """Raise ConfigError if a folder lacks safetensors weights or parts of them; it says what to do about others."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    with reading(folder):
        if single.exists():
            check_whole(single)
        elif index.exists():
            _check_shards(folder)
        elif link := next((path for path in (single, index) if path.is_symlink()), None):
            check_whole(link)  # it leads nowhere
        else:
            raise ConfigError(_what_it_holds(folder))


def check_tokenizer_file(folder: Path) -> None:
    """Raise ConfigError if a folder has no tokenizer that can be read: tokenizer.json, or SentencePiece's."""
    path = folder / "tokenizer.json"
    with reading(path):
        if path.exists():
            path.open("rb").close()
            return
        model, other = (
            next((folder / name for name in names if (folder / name).exists()), None)
            for names in (SENTENCE_PIECE_FILES, OTHER_TOKENIZERS)
        )
        if path.is_symlink():
            path.stat()  # it leads nowhere
    if model is not None:
        if any(find_spec(package) is None for package in ("sentencepiece", "google", "google.protobuf")):
            raise ConfigError(needs_packages(model))
        return
    if other is None:
        raise ConfigError(f"{folder} has no tokenizer.json (tokenizers of another format are not supported)")
    raise ConfigError(
        f"{folder} has {other.name}, but no tokenizer.json (tokenizers of another format are not supported); "
        "convert it: transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def needs_packages(model: Path) -> str:
    """Return what to do about a SentencePiece model where what reads it is not installed."""
    command = "pip install 'kunserve[sentencepiece]'"
    return f"{model.parent} has {model.name}, but no tokenizer.json: to read it needs {command}"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder's weights. ConfigError if there are none or the index is broken."""
    single = folder / SINGLE_FILE
    with reading(single):
        return [single] if single.exists() else sorted(set(indexed_files(folder).values()))


def indexed_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor, as the index of a sharded checkpoint says. ConfigError if it has none."""
    index = folder / INDEX_FILE
    with reading(index):
        if not index.exists():
            raise ConfigError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map; fetch it again")
    for file in weight_map.values():
        if not isinstance(file, str) or not SAFETENSORS.fullmatch(file):
            raise ConfigError(
                f"{index}: the weight_map names {show(file)}, which is no safetensors file of this folder"
            )
    return {name: folder / file for name, file in weight_map.items()}


def has_all_files(folder: Path) -> bool:
    """Return whether all files of the weights are there; their content is checked when they are opened."""
    try:
        with reading(folder):
            return all(path.exists() for path in weight_files(folder))
    except ConfigError:
        return False


def is_gguf(name: str) -> bool:
    """Return whether a file is GGUF by its name."""
    return name.lower().endswith(".gguf")


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that a file is of, as their names say: NAME-00001-of-00003.gguf, ..."""
    if (match := GGUF_PART.fullmatch(path.name)) is None or int(match[3]) == 0:
        return (path,)
    name, suffix, count = match[1], path.suffix, int(match[3])
    return tuple(path.with_name(f"{name}-{i:05}-of-{count:05}{suffix}") for i in range(1, count + 1))


def gguf_name(path: Path) -> str:
    """Return the name of a GGUF file's model: without its ending, and its number if it is one of several."""
    match = GGUF_PART.fullmatch(path.name)
    return match[1] if match else path.stem


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for: itself, or the one model of a folder without safetensors.

    Of several files of one model it is the first. ConfigError if a folder holds several models.
    """
    with reading(path):
        if not path.is_dir():
            return path if is_gguf(path.name) else None
        if any(os.path.lexists(path / name) for name in (SINGLE_FILE, INDEX_FILE)):
            return None  # a folder may be readable without its list
        names = sorted(os.listdir(path))
    models = {gguf_parts(path / name)[0]: name for name in names if is_gguf(name)}
    if len(models) > 1:
        shown = ", ".join(list(models.values())[:NUM_SHOWN])
        raise ConfigError(f"{path} holds {len(models)} GGUF models ({shown}): give --model the file of one of them")
    return next(iter(models), None)


def _check_shards(folder: Path) -> None:
    """Raise ConfigError if files that the index names are missing or not whole."""
    files = weight_files(folder)
    if missing := [path.name for path in files if not os.path.lexists(path)]:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX_FILE} names "
            f"({_first(missing)}): its download is not complete; fetch the rest"
        )
    for path in files:
        check_whole(path)


def _what_it_holds(folder: Path) -> str:
    """Return the error for a folder without safetensors weights: what is there in their place, and what to do."""
    names = sorted(name for name in os.listdir(folder) if name.isprintable())
    neither = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    if adapter := [name for name in names if name in ADAPTER_FILES]:
        return (
            f"{folder} is an adapter (it holds {_first(adapter)}), and adapters are not served: merge it into its "
            "model with peft's merge_and_unload(), save_pretrained(OTHER), and give that folder"
        )
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES) and not TRAINING_FILES.fullmatch(name)]:
        return (
            f"{folder} holds pickled weights ({_first(pickles)}), which are not read: a pickle can run any code. "
            "Take the model's safetensors, or convert: transformers' from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    if shards := [name for name in names if SHARD.fullmatch(name)]:
        return f"{folder} holds {_first(shards)}, but {neither}: its download is not complete; fetch the rest"
    if other := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder} holds {_first(other)}, but {neither}: rename it to {SINGLE_FILE} if it is the whole model "
            "in Hugging Face's format (consolidated files are not), else take the model in that format"
        )
    if not names:
        return f"{folder} is empty: a model's folder has config.json, tokenizer.json and {SINGLE_FILE}"
    unusual = [name for name in names if not name.endswith((".json", ".jinja"))] or names
    held = ", ".join(name + os.sep * (folder / name).is_dir() for name in unusual[:NUM_SHOWN])
    more = f" and {len(unusual) - NUM_SHOWN} more" if len(unusual) > NUM_SHOWN else ""
    return f"{folder} has {neither}, the only weights that are read; it holds {held}{more}"


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
