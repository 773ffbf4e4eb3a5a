"""ModelSpec: everything that tells one architecture from another, as data."""

from __future__ import annotations

import dataclasses
import json
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
        _positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary positions, found {self.head_dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (arXiv:2306.15595)."""

    factor: float

    def __post_init__(self):
        _positive(self, "factor", kind=float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """Base grows with the call length beyond `original_max_position`, in training too (transformers' "dynamic").

    In cached decoding the base follows the running length while past keys stay as they were rotated.
    """

    factor: float
    original_max_position: int

    def __post_init__(self):
        _positive(self, "factor", kind=float)
        _positive(self, "original_max_position")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedNTK:
    """Qwen's dynamic NTK (arXiv:2309.16609 section 3.1): base grows in powers of two of the row's length.

    Evaluation only. Each row's length is its count of valid tokens at prefill, and decoding keeps that base.
    """

    train_length: int

    def __post_init__(self):
        _positive(self, "train_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (arXiv:2104.09864), first half of a head rotated against the second."""

    theta: float = 10_000.0
    scaling: LinearScaling | DynamicNTK | ChunkedNTK | None = None

    def __post_init__(self):
        _positive(self, "theta", kind=float)
        _expect(self, "scaling", LinearScaling, DynamicNTK, ChunkedNTK, type(None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogN:
    """Queries beyond `train_length` are scaled by log(position) / log(train_length); evaluation only (Qwen)."""

    train_length: int

    def __post_init__(self):
        _positive(self, "train_length")
        if self.train_length < 2:
            raise InputError(f"LogN train_length must be at least 2, found {self.train_length}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """Gated feed-forward layer (SwiGLU, arXiv:2002.05202); `bias` on all three matrices."""

    intermediate_size: int
    activation: Literal["silu"] = "silu"
    bias: bool = False

    def __post_init__(self):
        _positive(self, "intermediate_size")
        if self.activation != "silu":
            raise InputError(f"MLP.activation must be 'silu', found {self.activation!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (arXiv:1910.07467)."""

    eps: float

    def __post_init__(self):
        _positive(self, "eps", kind=float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Output projection onto the vocabulary."""

    tie_word_embeddings: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One decoder-only language model.

    Attributes:
      vocab_size: rows of the embedding table (often padded beyond the tokenizer's ids).
      window: None for full attention, else one entry per layer: how many tokens back a query sees (itself included).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    attention: GQA
    position: Rope
    mlp: MLP
    norm: Norm
    head: Head = Head()
    window: tuple[int | None, ...] | None = None
    logn: LogN | None = None

    def __post_init__(self):
        _positive(self, "vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
        for name, part in (("attention", GQA), ("position", Rope), ("mlp", MLP), ("norm", Norm), ("head", Head)):
            _expect(self, name, part)
        _expect(self, "logn", LogN, type(None))
        _expect(self, "window", tuple, type(None))
        if self.window is not None and len(self.window) != self.num_layers:
            raise InputError(f"window has {len(self.window)} entries for {self.num_layers} layers")
        if self.window is not None and any(
            size is not None and (type(size) is not int or size < 1) for size in self.window
        ):
            raise InputError(f"window sizes must be positive integers or None, found {self.window}")


def tiny(spec: ModelSpec, *, vocab_size: int = 256, num_layers: int = 2) -> ModelSpec:
    """Shrink a spec to a size for tests; structure, ratios and rules stay."""
    heads = 4
    kv_heads = heads if spec.attention.num_kv_heads == spec.attention.num_heads else heads // 2
    return dataclasses.replace(
        spec,
        vocab_size=vocab_size,
        hidden_size=64,
        num_layers=num_layers,
        attention=dataclasses.replace(spec.attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=16),
        mlp=dataclasses.replace(spec.mlp, intermediate_size=96),
        window=None if spec.window is None else spec.window[:num_layers],
    )


def spec_to_json(spec: ModelSpec) -> str:
    """Write a spec as JSON; sum types carry their class name under "type"."""
    return json.dumps(_encode(spec), indent=2) + "\n"


def spec_from_json(text: str, source: str = "spec") -> ModelSpec:
    """Read a spec written by `spec_to_json`.

    Raises:
      InputError: invalid JSON, an unknown type or field, or a missing field, naming `source`.
    """
    try:
        spec = _decode(json.loads(text))
    except (json.JSONDecodeError, TypeError, InputError) as error:
        raise InputError(f"{source}: not a jaxllm model spec: {error}") from error
    if not isinstance(spec, ModelSpec):
        raise InputError(f"{source}: not a jaxllm model spec: found {type(spec).__name__}")
    return spec


_TYPES = {
    cls.__name__: cls for cls in (ModelSpec, GQA, Rope, LinearScaling, DynamicNTK, ChunkedNTK, LogN, MLP, Norm, Head)
}


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    return list(value) if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        name = value.get("type")
        if not isinstance(name, str) or name not in _TYPES:
            raise InputError(f"found an object of type {name!r}, expected one of {', '.join(_TYPES)}")
        return _TYPES[name](**{key: _decode(item) for key, item in value.items() if key != "type"})
    return tuple(value) if isinstance(value, list) else value


def _positive(part: Any, *names: str, kind: type = int) -> None:
    allowed, expected = ((int,), "a positive integer") if kind is int else ((int, float), "a positive number")
    for name in names:
        value = getattr(part, name)
        if type(value) not in allowed or not value > 0:
            raise InputError(f"{type(part).__name__}.{name} must be {expected}, found {value!r}")


def _expect(part: Any, name: str, *types: type) -> None:
    value = getattr(part, name)
    if not isinstance(value, types):
        expected = " or ".join(each.__name__ for each in types)
        raise InputError(f"{type(part).__name__}.{name} must be {expected}, found {value!r}")
