"""Model files, step 1: what `--model` names -> a folder on this machine and the model's shape."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import kunserve
from kunserve.errors import ConfigError
from kunserve.model.config import ModelConfig
from kunserve.model.config_fields import check_range, show
from kunserve.model.embedded import EmbeddedModel, prepare_embedded
from kunserve.model.files import expand_home, reading
from kunserve.model.folder import check_tokenizer_file, check_weight_files, gguf_name, gguf_of, is_gguf
from kunserve.model.gguf.file import GgufFile, read_gguf
from kunserve.model.gguf.shape import gguf_config
from kunserve.model.hf_config import check_config, load_hf_config
from kunserve.model.layout import formats_of
from kunserve.model.quant.scheme import FP8_OF_NUMBERS, SAME_METHODS
from kunserve.progress import Progress

CARDS = Path(kunserve.__file__).parent / "models"  # in a checkout a link to the top-level `models/`
# What the Hub's own library lets through, which is not imported for it: two names of up to 96 characters.
HUB_ID = re.compile(r"(?!.*(--|\.\.))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b(?<!\.git)", re.ASCII)
LOAD_FORMATS = ("auto", "dummy")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CardSampling:
    """What the authors recommend in words where their files do not say it; named and meant as in requests."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class CardDefaults:
    """What the server takes where no flag says otherwise."""

    max_model_len: int | None = None  # tokens of prompt and answer together
    sampling: CardSampling = CardSampling()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One file of `models/`: where the weights come from, under which licence, and the model's full shape."""

    name: str
    description: str
    licence: str
    config: ModelConfig
    hub_id: str | None = None
    embedded: EmbeddedModel | None = None
    defaults: CardDefaults = CardDefaults()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that can be loaded. `folder` is None only for dummy weights of a card: there is no tokenizer then."""

    name: str
    folder: Path | None
    config: ModelConfig
    card: ModelCard | None = None
    gguf: GgufFile | None = None  # what holds the weights, if not the folder


def card_folders() -> tuple[Path, Path]:
    """Return the folders that cards are looked for in: the user's own, then those that come with KunServe."""
    return config_root() / "models", CARDS


def list_cards(folders: Sequence[Path] | None = None) -> list[str]:
    """Return the names of all model cards in these folders (default: `card_folders`), sorted."""
    return sorted(_card_paths(folders))


def load_card(name: str, folders: Sequence[Path] | None = None) -> ModelCard:
    """Read the card of that name. Raises ConfigError for an unknown name or a card that is not right."""
    paths = _card_paths(folders)
    path = paths.get(name)
    if path is None:
        raise ConfigError(f"no model card {name!r}{_suggest(name, sorted(paths))}")
    try:
        with reading(path):
            values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"cannot read {path}: it is nested too deeply") from None
    try:
        card = _build(ModelCard, values, "")
        check_config(card.config)
        if card.defaults.max_model_len is not None:
            check_range("defaults.max_model_len", card.defaults.max_model_len)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    if card.name != name:
        raise ConfigError(f"{path}: the card calls itself {show(card.name)}")
    return card


def check_model(
    name_or_path: str,
    load_format: str = "auto",
    folders: Sequence[Path] | None = None,
    *,
    quantization: str | None = None,
) -> None:
    """Raise the ConfigError of `resolve_model`, as far as it is known without fetching, and without importing torch."""
    found = _locate(name_or_path, load_format, folders)
    if isinstance(found, Path):
        quantized_as(_read_config(found, load_format), quantization, is_gguf=gguf_of(found) is not None)


def resolve_model(
    name_or_path: str,
    *,
    load_format: str = "auto",
    cache_dir: Path | None = None,
    progress: Progress = lambda text, share: None,
    folders: Sequence[Path] | None = None,
    quantization: str | None = None,
) -> ModelFiles:
    """Find or fetch a model: the name of a card, a Hugging Face folder, a GGUF file or its folder, or a Hub id.

    With `load_format="dummy"` a card needs no files at all. `quantization`: see `quantized_as`. Raises ConfigError, one
    line that says what to do.
    """
    files = _resolve(_locate(name_or_path, load_format, folders), load_format, cache_dir, progress)
    return replace(files, config=quantized_as(files.config, quantization, is_gguf=files.gguf is not None))


def quantized_as(config: ModelConfig, method: str | None, *, is_gguf: bool = False) -> ModelConfig:
    """Return a model as `--quantization` asks for it: fp8 makes 8-bit matrices of numbers; others name what is there.

    ConfigError if the checkpoint is quantized in another way, or not at all.
    """
    if method is None:
        return config
    asked, scheme = SAME_METHODS.get(method, method), config.formats.scheme
    found = "gguf" if is_gguf else None if scheme is None else scheme.method
    if asked == found:
        return config
    if found is not None:
        what = "it is a GGUF file" if is_gguf else f"the checkpoint is quantized with {found}"
        raise ConfigError(f"--quantization {method}: {what}, which is served as it is; leave the flag out")
    if asked != "fp8":
        raise ConfigError(f"--quantization {method}: the checkpoint is not quantized; only fp8 is made while it loads")
    return replace(config, formats=formats_of(config, FP8_OF_NUMBERS))


def _resolve(found: ModelCard | Path | str, load_format: str, cache_dir: Path | None, progress: Progress) -> ModelFiles:
    if isinstance(found, ModelCard):
        return _resolve_card(found, load_format, cache_dir or cache_root(), progress)
    if isinstance(found, Path):
        if file := gguf_of(found):
            return _resolve_gguf(file, cache_dir or cache_root(), progress)
        return ModelFiles(found.name, found, _read_folder(found, load_format))
    folder = _hub_folder(found, progress)
    return ModelFiles(found, folder, _read_folder(folder, load_format))


def find_config(name_or_path: str, folders: Sequence[Path] | None = None) -> ModelConfig:
    """Return the configuration of a card, or of a Hugging Face folder, which needs no weights. Raises ConfigError."""
    found = _locate(name_or_path, "auto", folders)
    if isinstance(found, ModelCard):
        return found.config
    if isinstance(found, Path):
        return gguf_config(read_gguf(file)) if (file := gguf_of(found)) else load_hf_config(found)
    raise ConfigError(f"no model {name_or_path!r}{_suggest(name_or_path, list_cards(folders))}, nor a folder")


def _locate(name_or_path: str, load_format: str, folders: Sequence[Path] | None) -> ModelCard | Path | str:
    """Return what a name stands for: a card, a folder or a GGUF file, or a Hub id. ConfigError if nothing can."""
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"no load format {load_format!r}{_suggest(load_format, LOAD_FORMATS)}")
    if not name_or_path.isprintable():  # a line break would break the one line of every error
        raise ConfigError(f"--model {show(name_or_path)}: the name holds a character that cannot be printed")
    names = list_cards(folders)
    if name_or_path in names:
        return load_card(name_or_path, folders)
    path = expand_home(name_or_path, "--model")
    with reading(path):
        if path.is_dir():
            return path.resolve()
        if path.exists():
            if is_gguf(path.name):
                return path.absolute()  # a link's own name is the model's, not that of a blob
            raise ConfigError(f"--model {name_or_path} is a file; it must be a folder with config.json, or GGUF")
    if HUB_ID.fullmatch(name_or_path):
        return name_or_path
    if os.sep in name_or_path:
        raise ConfigError(f"--model {name_or_path}: there is no such folder, and the Hub has no names like this")
    raise ConfigError(f"no model {name_or_path!r}{_suggest(name_or_path, names)}")


def _read_config(path: Path, load_format: str) -> ModelConfig:
    """Return the model that a folder or a GGUF file holds. ConfigError if it is none that can be served."""
    return gguf_config(read_gguf(file)) if (file := gguf_of(path)) else _read_folder(path, load_format)


def _resolve_gguf(path: Path, cache_dir: Path, progress: Progress) -> ModelFiles:
    from kunserve.model.gguf.prepare import prepare_gguf  # imports tokenizers

    progress(f"reading {path.name}", 0.0)
    file = read_gguf(path)
    config = gguf_config(file)
    return ModelFiles(gguf_name(path), prepare_gguf(file, config, cache_dir), config, gguf=file)


def _read_folder(folder: Path, load_format: str) -> ModelConfig:
    """Return the model that a Hugging Face folder holds. ConfigError if it is none that can be served."""
    with reading(folder):
        has_config = (folder / "config.json").exists()
    if load_format != "dummy" or not has_config:
        check_weight_files(folder)
    config = load_hf_config(folder)
    check_tokenizer_file(folder)
    return config


def _card_paths(folders: Sequence[Path] | None) -> dict[str, Path]:
    """Return the file of each card by name; where two folders have one, the first folder's."""
    searched = card_folders() if folders is None else folders
    return {path.stem: path for folder in reversed(searched) for path in _cards_in(folder)}


def _cards_in(folder: Path) -> list[Path]:
    """Return the cards of a folder; none of one that is not there or that this user may not read."""
    try:
        return [folder / name for name in os.listdir(folder) if name.endswith(".toml")]
    except OSError:  # for instance another user's HOME, as in containers: the cards of KunServe are known without it
        return []


def config_root() -> Path:
    """Return the folder for what users write: KUNSERVE_CONFIG, or $XDG_CONFIG_HOME/kunserve, or ~/.config/kunserve."""
    if own := os.environ.get("KUNSERVE_CONFIG"):
        return expand_home(own, "KUNSERVE_CONFIG")
    if users := os.environ.get("XDG_CONFIG_HOME"):
        return expand_home(users, "XDG_CONFIG_HOME") / "kunserve"
    return expand_home("~/.config/kunserve", "KUNSERVE_CONFIG")


def cache_root() -> Path:
    """Return the folder for what we make ourselves: KUNSERVE_CACHE, or ~/.cache/kunserve."""
    return expand_home(os.environ.get("KUNSERVE_CACHE") or "~/.cache/kunserve", "KUNSERVE_CACHE")


def _hub_folder(hub_id: str, progress: Progress) -> Path:
    from kunserve.model.hub.snapshot import (
        hub_folder,  # imports the Hub's library: time that only models of the Hub need
    )

    return hub_folder(hub_id, progress)


def _resolve_card(card: ModelCard, load_format: str, cache_dir: Path, progress: Progress) -> ModelFiles:
    if load_format == "dummy":
        return ModelFiles(card.name, None, card.config, card)
    if card.embedded is not None:
        folder = cache_dir / "models" / f"{card.name}-{card.embedded.sha256[:8]}"
        prepare_embedded(card.embedded, folder, progress=lambda text: progress(text, 0.0))
    elif card.hub_id is not None:
        try:
            folder = _hub_folder(card.hub_id, progress)
        except ConfigError as error:
            raise ConfigError(f"{card.name}: {error.message}, or try it with --load-format dummy") from None
    else:
        raise ConfigError(f"the card {card.name} names no weights; use --load-format dummy")
    return ModelFiles(card.name, folder, _read_folder(folder, load_format), card)


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a TOML table, nested tables too. Raises ConfigError naming the field."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            shown = name if name.isprintable() else show(name)
            raise ConfigError(f"unknown field {where}{shown}{_suggest(name, list(fields))}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"field {where}{name} is missing")
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one TOML value against a field's type: int takes no float or bool, float takes int."""
    choices = [kind for kind in get_args(hint) if kind is not type(None)] if type(None) in get_args(hint) else [hint]
    kind = choices[0]
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, f"{where}.")  # type: ignore[arg-type]
    if get_args(kind) and isinstance(value, list):  # tuple[int, ...]
        return tuple(_convert(get_args(kind)[0], item, where) for item in value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf  # a double ends at 2**1024
    if type(value) is not kind:
        raise ConfigError(f"field {where}: expected {getattr(kind, '__name__', kind)}, not {show(value)}")
    return value


def _suggest(name: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(known)}"
