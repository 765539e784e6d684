"""The shape of a decoder: what `config.json` says, as flags of one family of models."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.model.quant.formats import NO_BLOCKS, Formats


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer (Llama 2/3, Mistral, Qwen2/2.5, Qwen3). Sizes in elements."""

    family: str  # "llama", "mistral", "qwen2", "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"  # of the checkpoint: "float32", "float16", "bfloat16", "float64"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    formats: Formats = NO_BLOCKS  # of matrices that are stored in blocks

    @property
    def q_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key (or value) heads of one token."""
        return self.num_kv_heads * self.head_dim
