"""GGUF: what else a server reads of a model (config, tokenizer, chat template), as a small folder in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kunserve.errors import ConfigError
from kunserve.model.config import ModelConfig
from kunserve.model.config_fields import show
from kunserve.model.file_lock import file_lock
from kunserve.model.files import reading
from kunserve.model.folder import SINGLE_FILE
from kunserve.model.gguf.file import GgufFile, read_gguf
from kunserve.model.gguf.shape import gguf_config, hf_values
from kunserve.model.gguf.tokenizer import OTHER, save_tokenizer
from kunserve.model.hf_config import parse_hf_config
from kunserve.model.layout import expected_shapes
from kunserve.model.quant.formats import NO_BLOCKS

FORMAT = 5  # of the folder: raise it when other files would be written


def prepare_gguf(file: GgufFile, config: ModelConfig, cache: Path) -> Path:
    """Return the folder that belongs to a GGUF file, making it first where it is missing: all but the weights.

    It is made once for each state of the file. Raises ConfigError (another tokenizer, no room in the cache).
    """
    first = file.paths[0]
    with reading(first):
        status = first.stat()
    key = json.dumps([FORMAT, str(first.resolve()), status.st_size, status.st_mtime_ns])
    folder = cache / "gguf" / f"{first.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.parent / f".{folder.name}.lock", lambda: None):
            if not folder.exists():
                work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
                try:
                    _write(file, config, work)
                    work.rename(folder)  # whole, or not at all
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        advice = "; KUNSERVE_CACHE=FOLDER names another folder"
        raise ConfigError(f"cannot prepare {first} in {folder}: {error.strerror or error}{advice}") from None
    return folder


def convert_gguf(path: Path, folder: Path, progress: Callable[[str], None] = lambda _: None) -> ModelConfig:
    """Write config, tokenizer and float32 weights of a GGUF file into `folder`, a Hugging Face folder then.

    Raises ConfigError when the file is damaged, or holds an architecture or tokenizer we do not know, or one whose
    checkpoints keep tensors in another form (gpt-oss).
    """
    import torch  # names are judged without it
    from safetensors.torch import save_file

    from kunserve.model.family.stored import stored_form
    from kunserve.model.gguf.source import GgufSource

    file = read_gguf(path)
    config = replace(gguf_config(file), formats=NO_BLOCKS)
    added = parse_hf_config(hf_values(file)).norm_offset - config.norm_offset
    source, tensors, shapes = GgufSource(file, config), {}, expected_shapes(config)
    if others := [name for name in shapes if stored_form(name) is not None]:
        raise ConfigError(f"{path}: a checkpoint keeps {others[0]} in another form: it is not converted")
    for i, (name, shape) in enumerate(shapes.items()):
        if i % 90 == 0:
            progress(f"dequantizing weights: {i} of {len(shapes)} tensors")
        tensors[name] = torch.empty(shape)
        source.copy_into(name, tensors[name])
        if name.endswith("norm.weight"):
            tensors[name] -= added
    progress("writing the converted model")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    _write(file, config, folder)
    return replace(config, norm_offset=config.norm_offset + added)


def _write(file: GgufFile, config: ModelConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(hf_values(file), indent=2), encoding="utf-8")
    try:
        save_tokenizer(file.metadata, config.max_position_embeddings, config.eos_token_ids, folder)
    except ConfigError as error:
        raise ConfigError(f"{file.paths[0]}: {error.message}") from None
    except OSError:  # of the folder, not of the file
        raise
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file.paths[0]}: its tokenizer cannot be built: {show(str(error))}: {OTHER}") from None
