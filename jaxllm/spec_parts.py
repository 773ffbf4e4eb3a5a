"""The parts that a ModelSpec is made of: each field of it is one of these."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxllm.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQA:
    """Multi-head attention with shared key and value heads (arXiv:2305.13245); MHA when both counts are equal."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention (arXiv:2405.04434 section 2.1): keys and values are read from one small latent.

    Attributes:
      q_lora_rank: width of the queries' own latent; None: queries come straight from the hidden state.
      qk_nope_head_dim, qk_rope_head_dim: parts of a head's query and key without and with rotary positions; the
        rotary part of the key is one for all heads.
      bias: on the matrices that read the hidden state into latents, and on the output matrix.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False

    def __post_init__(self):
        require_positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            require_positive(self, "q_lora_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (arXiv:2306.15595)."""

    factor: float

    def __post_init__(self):
        require_positive(self, "factor", kind=float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """Base grows with the call length beyond `original_max_position`, in training too (transformers' "dynamic").

    In cached decoding the base follows the running length. Attribute `cached_keys`: "rotated" keeps past keys as they
    were rotated (transformers, InternLM2), "unrotated" rotates all of them anew at each step (InternLM v1).
    """

    factor: float
    original_max_position: int
    cached_keys: Literal["rotated", "unrotated"] = "rotated"

    def __post_init__(self):
        require_positive(self, "factor", kind=float)
        require_positive(self, "original_max_position")
        require_one_of(self, "cached_keys", "rotated", "unrotated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedNTK:
    """Qwen's dynamic NTK (arXiv:2309.16609 section 3.1): base grows in powers of two of the row's length.

    Evaluation only. Each row's length is its count of valid tokens at prefill, and decoding keeps that base.
    """

    train_length: int

    def __post_init__(self):
        require_positive(self, "train_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv:2309.00071): slow frequencies are interpolated, fast ones kept, whatever the call length.

    Attributes:
      factor: how many times longer than `original_max_position` the context became.
      beta_fast, beta_slow: rotations over the original context that bound the ramp between the two.
      mscale, mscale_all_dim: DeepSeek-V2's two temperatures, with g(m) = 0.1 m ln(factor) + 1: cos and sin are scaled
        by g(mscale) / g(mscale_all_dim), scores by g(mscale_all_dim)^2. The defaults are the paper's.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        require_positive(self, "factor", "beta_fast", "beta_slow", kind=float)
        require_positive(self, "original_max_position")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (arXiv:2104.09864).

    Attributes:
      rotary_fraction: share of a head's dimensions that are rotated, the first ones.
      layout: "half" rotates the first half of them against the second, "interleaved" neighbours (2i, 2i + 1).
      inv_freq_dtype: precision that the frequencies are rounded to (GLM-130B: float16 as published).
      table_length: positions that the published code has rotations for, where it fails beyond them (ChatGLM2, 3).
    """

    theta: float = 10_000.0
    scaling: LinearScaling | DynamicNTK | ChunkedNTK | Yarn | None = None
    rotary_fraction: float = 1.0
    layout: Literal["half", "interleaved"] = "half"
    inv_freq_dtype: Literal["float32", "float16"] = "float32"
    table_length: int | None = None

    def __post_init__(self):
        require_positive(self, "theta", "rotary_fraction", kind=float)
        if self.rotary_fraction > 1:
            raise InputError(f"Rope.rotary_fraction must be at most 1, found {self.rotary_fraction}")
        if self.table_length is not None:
            require_positive(self, "table_length")
        require_type(self, "scaling", LinearScaling, DynamicNTK, ChunkedNTK, Yarn, type(None))
        require_one_of(self, "layout", "half", "interleaved")
        require_one_of(self, "inv_freq_dtype", "float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope2D:
    """Two rotary positions (ChatGLM-6B): a head's first half turns with the position, its second with the block's."""

    theta: float = 10_000.0
    inv_freq_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        require_positive(self, "theta", kind=float)
        require_one_of(self, "inv_freq_dtype", "float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """Scores fall linearly with the distance, steeper in some heads than in others (arXiv:2108.12409)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedBlock:
    """Two learned position tables, for the position and for the place within a block (arXiv:2103.10360 section 2.3).

    Attributes:
      num_positions: rows of each table.
    """

    num_positions: int

    def __post_init__(self):
        require_positive(self, "num_positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogN:
    """Queries beyond `train_length` are scaled by log(position) / log(train_length); evaluation only (Qwen)."""

    train_length: int

    def __post_init__(self):
        require_positive(self, "train_length")
        if self.train_length < 2:
            raise InputError(f"LogN train_length must be at least 2, found {self.train_length}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """Feed-forward layer; gated: down(activation(gate x) * up x) (arXiv:2002.05202), else down(activation(up x)).

    Attributes:
      activation: "gelu" is the exact form with erf, "gelu_tanh" its approximation.
      bias: on all matrices.
    """

    intermediate_size: int
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        require_positive(self, "intermediate_size")
        require_one_of(self, "activation", "silu", "gelu", "gelu_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceLosses:
    """Weights of DeepSeek-V2's three losses that balance the experts (arXiv:2405.04434 eq. 23-31).

    Attributes:
      expert, device, communication: alpha_1, alpha_2, alpha_3; a device is a group of experts.
      per_sequence: each sequence is balanced by itself; False: the batch as a whole.
    """

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    per_sequence: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """Mixture of experts in place of the feed-forward layer (arXiv:2405.04434 section 2.2, arXiv:2401.06066).

    Attributes:
      moe_intermediate_size: inner width of one expert.
      num_shared_experts: experts that every token passes, as one feed-forward layer of their joint width.
      first_k_dense: the first layers keep the dense feed-forward layer.
      layer_freq: of the others, those whose number is a multiple of this are mixtures.
      num_groups, topk_groups: experts lie in equal groups, and a token chooses among the best groups only.
      scaling_factor: multiplies the chosen experts' weights; not applied with `norm_topk_prob`, as published.
      norm_topk_prob: the chosen weights are made to sum to one.
      capacity_factor: in training, selections beyond this share of a group's mean load are dropped; None: none are.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int = 0
    first_k_dense: int = 0
    layer_freq: int = 1
    num_groups: int = 1
    topk_groups: int = 1
    scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    balance: BalanceLosses = BalanceLosses()
    capacity_factor: float | None = None

    def __post_init__(self):
        require_positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "layer_freq")
        require_positive(self, "num_groups", "topk_groups")
        require_positive(self, "scaling_factor", kind=float)
        require_type(self, "balance", BalanceLosses)
        if self.num_experts % self.num_groups:
            raise InputError(f"num_experts {self.num_experts} must be a multiple of num_groups {self.num_groups}")
        if self.topk_groups > self.num_groups:
            raise InputError(f"topk_groups {self.topk_groups} must be at most num_groups {self.num_groups}")
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok must be at most {self.num_experts}, found {self.num_experts_per_tok}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (arXiv:1910.07467), or LayerNorm with scale and bias (arXiv:1607.06450)."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"

    def __post_init__(self):
        require_positive(self, "eps", kind=float)
        require_one_of(self, "kind", "rms", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreNorm:
    """x + f(norm(x))."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepNorm:
    """alpha * norm(x) + f(norm(x)), as GLM-130B and ChatGLM-6B are coded (after arXiv:2203.00555)."""

    alpha: float

    def __post_init__(self):
        require_positive(self, "alpha", kind=float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandwichNorm:
    """x + norm'(f(norm(x))) (GLM-4-0414)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Output projection onto the vocabulary.

    Attributes:
      normalized: each token's row is brought to length one before use (Baichuan2's NormHead).
      max_z_loss: weight of mean(max(logits)^2) in the training loss of the checkpoint's own config (Baichuan2).
    """

    tie_word_embeddings: bool = False
    normalized: bool = False
    max_z_loss: float = 0.0


def require_positive(part: Any, *names: str, kind: type = int) -> None:
    """Raise InputError where one of these fields is no positive integer (or number)."""
    allowed, expected = ((int,), "a positive integer") if kind is int else ((int, float), "a positive number")
    for name in names:
        value = getattr(part, name)
        if type(value) not in allowed or not value > 0:
            raise InputError(f"{type(part).__name__}.{name} must be {expected}, found {value!r}")


def require_type(part: Any, name: str, *types: type) -> None:
    """Raise InputError where a field has none of these types."""
    value = getattr(part, name)
    if not isinstance(value, types):
        expected = " or ".join(each.__name__ for each in types)
        raise InputError(f"{type(part).__name__}.{name} must be {expected}, found {value!r}")


def require_one_of(part: Any, name: str, *values: str) -> None:
    """Raise InputError where a field has none of these values."""
    if getattr(part, name) not in values:
        expected = " or ".join(map(repr, values))
        raise InputError(f"{type(part).__name__}.{name} must be {expected}, found {getattr(part, name)!r}")
