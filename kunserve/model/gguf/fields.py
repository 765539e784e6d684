"""GGUF: the metadata of a file's architecture, each value read by its kind, and what nobody has read."""

from __future__ import annotations

from typing import Any

from kunserve.errors import ConfigError
from kunserve.model.config_fields import show
from kunserve.model.gguf.file import GgufFile

OTHERWISE = "take the model in safetensors instead of GGUF"
# What changes a model's answers, and the value with which it does not. An architecture that does not read one of
# these would be served as if the file did not have it.
NEUTRAL = {
    **dict.fromkeys(("attention.scale", "embedding_scale", "residual_scale", "logit_scale"), 1),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), 0),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_scale"), 0),
    **dict.fromkeys(("attention.sliding_window", "attention.shared_kv_layers", "full_attention_interval"), 0),
    **dict.fromkeys(("expert_count", "expert_shared_count", "leading_dense_block_count", "nextn_predict_layers"), 0),
    **dict.fromkeys(("expert_group_count", "expert_group_used_count"), 1),
    **dict.fromkeys(("expert_weights_scale", "expert_gating_func"), 1),  # a factor of 1; softmax
    **dict.fromkeys(("pooling_type", "n_deepstack_layers", "swiglu_clamp_exp", "swiglu_clamp_shexp"), 0),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"), 1),
    **dict.fromkeys(("rope.scaling.yarn_log_multiplier", "rope.scaling.alpha"), 0),
}
# What of `rope.*` has no effect by itself. Any other that is not read is refused: positions would be rotated otherwise.
WITHOUT_EFFECT = tuple(
    f"rope.scaling.{name}" for name in ("finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
)


class Fields:
    """The metadata of one architecture: `llama.block_count` and so on. Floats are as somebody wrote them."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self._prefix, self._read = f"{architecture}.", set[str]()

    def get(self, name: str) -> Any:
        """Return a value, or None."""
        self._read.add(name)
        return self.file.metadata.get(self._prefix + name)

    def whole(self, name: str, default: int | None = None) -> int:
        """Return an integer, or the one that all layers have. ConfigError if it is none, or is missing."""
        value = self.get(name)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        value = self._present(name, value, default)
        if type(value) is not int:
            raise ConfigError(f"metadata {self._prefix}{name}: expected a whole number, not {show(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number. ConfigError if it is none, or missing without a default."""
        value = self._present(name, self.get(name), default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"metadata {self._prefix}{name}: expected a number, not {type(value).__name__}")
        return value if isinstance(value, int) else shortest(value)

    def number_if_any(self, name: str) -> float | None:
        """Return a number; None where it is absent or 0, which stands for none."""
        return self.number(name, 0.0) or None

    def has(self, tensor: str) -> bool:
        """Tell whether the file has a tensor."""
        return tensor in self.file.tensors

    def refuse_unread(self) -> None:
        """Raise ConfigError for the first value that changes answers and that nobody has asked for."""
        if self.get("attention.causal") is False:
            raise ConfigError(f"metadata {self._prefix}attention.causal: False is not supported: it is no decoder")
        neutral = NEUTRAL | {"rope.freq_base_swa": self.number("rope.freq_base", 10000.0)}
        found = {name.removeprefix(self._prefix): value for name, value in self.file.metadata.items()}
        of_rotation = (name for name in found if name.startswith("rope.") and name not in WITHOUT_EFFECT)
        for name in (*NEUTRAL, *of_rotation):
            value, full_name = None if name in self._read else found.get(name), self._prefix + name
            if value and value != neutral.get(name):
                raise ConfigError(f"metadata {full_name}: {show(value)} is not supported: {OTHERWISE}")

    def _present(self, name: str, value: Any, default: Any) -> Any:
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"metadata lack {self._prefix}{name}")
        return value


def shortest(value: float) -> float:
    """Return the decimal number that somebody wrote: 9.999999747378752e-06 was 1e-05 before it became a float32."""
    return float(f"{value:.7g}")
