"""The shape of a decoder: what `config.json` says, as values that one forward path reads."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.model.quant.formats import NO_BLOCKS, Formats

ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
SWIGLU_ALPHA = 1.702  # gain of clamped_swiglu: gpt-oss's


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotation is stretched for contexts longer than the original ones (`rope_type` of a `config.json`)."""

    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0  # llama3, yarn, longrope
    kind: str = "llama3"  # one of ROPE_KINDS
    attention_factor: float = 1.0  # yarn, longrope: cosines and sines are multiplied by it
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: a divisor for each pair, within the original length
    long_factors: tuple[float, ...] = ()  # beyond it


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that takes the place of a layer's MLP."""

    num_experts: int
    num_per_token: int  # that the router chooses for each token
    intermediate_size: int  # of one expert
    normalize: bool = True  # whether the weights of the chosen ones are made to sum to 1
    style: str = "qwen"  # names of the checkpoint's tensors: a key of kunserve.model.layout.EXPERT_NAMES
    has_bias: bool = False  # router and experts add biases
    shared_size: int = 0  # intermediate size of the shared expert, which every token goes through; 0: there is none
    has_shared_gate: bool = False  # what it makes of a token is multiplied by the sigmoid of a number for each token

    @property
    def held_size(self) -> int:
        """Return the intermediate size of all experts together."""
        return self.num_experts * self.intermediate_size + self.shared_size

    @property
    def active_size(self) -> int:
        """Return the intermediate size of the experts that one token goes through."""
        return self.num_per_token * self.intermediate_size + self.shared_size


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer; `kunserve/model/family/families.py` says which. Sizes in elements."""

    family: str  # a name of kunserve.model.family.families.FAMILIES: only what it says below is computed
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
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"  # of the checkpoint: "float32", "float16", "bfloat16", "float64"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    formats: Formats = NO_BLOCKS  # of matrices that are stored in blocks
    # rotation
    partial_rotary_factor: float = 1.0  # the share of a head, from its first element on, that is rotated
    local_rope_theta: float | None = None  # of layers with a window, which then are not scaled
    nope_layers: tuple[int, ...] = ()  # layers that do not rotate
    # attention
    window: int | None = None  # a token of `windowed_layers` sees itself and the `window` - 1 before it
    windowed_layers: tuple[int, ...] = ()
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores x become c * tanh(x / c)
    has_sinks: bool = False  # a learned score per head takes part in softmax and has no value
    qk_norm_whole: bool = False  # q and k are normed over all heads together, not head by head
    o_bias: bool = False
    # norms, MLP
    norm_offset: float = 0.0  # what is added to norm weights: 1 where they are kept around 0
    pre_norms: bool = True  # what goes into attention and MLP is normed
    post_norms: bool = False  # what comes out of them is normed, before it is added
    activation: str = "silu"  # one of ACTIVATIONS
    swiglu_limit: float = 0.0  # clamped_swiglu: bound of gate and up
    mlp_bias: bool = False
    has_fused_tensors: bool = False  # the checkpoint holds q, k, v as one tensor, and gate, up
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()  # layers that have an MLP in a model with experts
    # scales
    embed_scale: float = 1.0  # embeddings are multiplied by it
    residual_scale: float = 1.0  # what attention and MLP add is multiplied by it
    logit_divisor: float = 1.0
    logit_softcap: float | None = None

    @property
    def q_size(self) -> int:
        """Return how many elements all query heads of one token have."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Return how many elements all key (or value) heads of one token have."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Return how many elements of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def experts_of(self, layer: int) -> Experts | None:
        """Return the experts of a layer; None if it has an MLP."""
        return None if layer in self.dense_layers else self.experts

    @property
    def common_window(self) -> int | None:
        """Return how many tokens a token sees in every layer, itself among them; None if it sees all in one of them."""
        return self.window if set(self.windowed_layers) >= set(range(self.num_layers)) else None

    @property
    def near_layers(self) -> tuple[int, ...]:
        """Return the layers with a window, in order, if others have none: their KV can be of a kind of its own."""
        is_mixed = self.window is not None and self.common_window is None
        return tuple(sorted(self.windowed_layers)) if is_mixed else ()

    def window_of(self, layer: int) -> int | None:
        """Return the tokens that a token of a layer sees; None if it sees all."""
        return self.window if layer in self.windowed_layers else None
