"""ModelSpec: everything that tells one architecture from another, as data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from jaxllm.errors import InputError
from jaxllm.spec_parts import (
    GQA,
    MLA,
    MLP,
    Alibi,
    BalanceLosses,
    ChunkedNTK,
    DeepNorm,
    DynamicNTK,
    Head,
    LearnedBlock,
    LinearScaling,
    LogN,
    MoE,
    Norm,
    PreNorm,
    Rope,
    Rope2D,
    SandwichNorm,
    Yarn,
    require_one_of,
    require_positive,
    require_type,
)

__all__ = [
    "GQA",
    "MLA",
    "MLP",
    "Alibi",
    "BalanceLosses",
    "ChunkedNTK",
    "DeepNorm",
    "DynamicNTK",
    "Head",
    "LayerGroup",
    "LearnedBlock",
    "LinearScaling",
    "LogN",
    "MoE",
    "ModelSpec",
    "Norm",
    "PreNorm",
    "Rope",
    "Rope2D",
    "SandwichNorm",
    "Yarn",
    "spec_from_json",
    "spec_to_json",
    "tiny",
]


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of one structure, which run as one scan.

    Attributes:
      name: of their parameters. start, stop: the layers' numbers. moe: whether their feed-forward is a mixture.
    """

    name: str
    start: int
    stop: int
    moe: bool

    @property
    def layers(self) -> range:
        """Numbers of the layers."""
        return range(self.start, self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One decoder-only language model.

    Attributes:
      vocab_size: rows of the embedding table (often padded beyond the tokenizer's ids).
      mlp: the dense feed-forward layer; with `moe` that of the first layers, and the experts' activation.
      mask: "causal", or "prefix": all of a row up to its <sop> is seen by every token (GLM).
      window: None for full attention, else one entry per layer: how many tokens back a query sees (itself included).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    attention: GQA | MLA
    position: Rope | Rope2D | Alibi | LearnedBlock
    mlp: MLP
    norm: Norm
    moe: MoE | None = None
    residual: PreNorm | DeepNorm | SandwichNorm = PreNorm()
    head: Head = Head()
    mask: Literal["causal", "prefix"] = "causal"
    window: tuple[int | None, ...] | None = None
    logn: LogN | None = None

    def __post_init__(self):
        require_positive(self, "vocab_size", "hidden_size", "num_layers", "max_position_embeddings")
        require_type(self, "attention", GQA, MLA)
        require_type(self, "position", Rope, Rope2D, Alibi, LearnedBlock)
        require_type(self, "residual", PreNorm, DeepNorm, SandwichNorm)
        for name, part in (("mlp", MLP), ("norm", Norm), ("head", Head)):
            require_type(self, name, part)
        require_type(self, "moe", MoE, type(None))
        require_type(self, "logn", LogN, type(None))
        require_type(self, "window", tuple, type(None))
        require_one_of(self, "mask", "causal", "prefix")
        if isinstance(self.attention, MLA):
            self._check_latent_attention()
        if self.moe is not None and (self.mlp.bias or not self.mlp.gated):
            raise InputError("the experts of a mixture are gated and have no biases, and so is its dense layer")
        if self.rotary_dim % (4 if isinstance(self.position, Rope2D) else 2):
            raise InputError(f"rotated dimensions of a head come in pairs, found {self.rotary_dim}")
        if self.window is not None and len(self.window) != self.num_layers:
            raise InputError(f"window has {len(self.window)} entries for {self.num_layers} layers")
        if self.window is not None and any(
            size is not None and (type(size) is not int or size < 1) for size in self.window
        ):
            raise InputError(f"window sizes must be positive integers or None, found {self.window}")

    def _check_latent_attention(self):
        rope = self.position
        if not isinstance(rope, Rope):
            raise InputError(f"MLA needs rotary positions, found {type(rope).__name__}")
        if rope.rotary_fraction != 1:
            raise InputError("MLA names its rotated dimensions itself: rotary_fraction must be 1")
        if self.logn is not None:
            raise InputError("MLA has no LogN scaling")
        if isinstance(rope.scaling, DynamicNTK) and rope.scaling.cached_keys == "unrotated":
            raise InputError("MLA caches rotated keys, found cached_keys 'unrotated'")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with the position; 0 without rotary positions."""
        if isinstance(self.attention, MLA):
            return self.attention.qk_rope_head_dim
        if isinstance(self.position, Rope):
            return round(self.attention.head_dim * self.position.rotary_fraction)
        return self.attention.head_dim if isinstance(self.position, Rope2D) else 0

    @property
    def uses_block_positions(self) -> bool:
        """Whether tokens have a second position, their place within a block."""
        return isinstance(self.position, Rope2D | LearnedBlock)

    @property
    def rope_length_by_row(self) -> bool:
        """Whether a length-dependent position rule counts each row's valid tokens (Qwen), not the call's length."""
        return isinstance(self.position, Rope) and isinstance(self.position.scaling, ChunkedNTK)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The runs of layers of one structure; a single run is called "layers", several "layers_0", "layers_1" ..."""
        is_moe = [self._is_moe(layer) for layer in range(self.num_layers)]
        starts = [layer for layer in range(self.num_layers) if layer == 0 or is_moe[layer] != is_moe[layer - 1]]
        stops = [*starts[1:], self.num_layers]
        return tuple(
            LayerGroup("layers" if len(starts) == 1 else f"layers_{i}", start, stop, is_moe[start])
            for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
        )

    def _is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_k_dense and layer % self.moe.layer_freq == 0


def tiny(spec: ModelSpec, *, vocab_size: int = 256, num_layers: int = 2) -> ModelSpec:
    """Shrink a spec to a size for tests; structure, ratios and rules stay."""
    moe = spec.moe
    if moe is not None:
        groups = min(moe.num_groups, 4)
        moe = dataclasses.replace(
            moe,
            num_experts=8,
            num_experts_per_tok=min(moe.num_experts_per_tok, 3),
            moe_intermediate_size=24,
            first_k_dense=min(moe.first_k_dense, num_layers - 1),
            num_groups=groups,
            topk_groups=min(moe.topk_groups, groups),
        )
    changes: dict[str, Any] = {}
    if isinstance(spec.position, LearnedBlock):
        changes = {"position": LearnedBlock(num_positions=129), "max_position_embeddings": 128}
    if isinstance(spec.residual, DeepNorm):
        ratio = (num_layers / spec.num_layers) ** 0.5
        changes["residual"] = DeepNorm(alpha=spec.residual.alpha * ratio)
    inner = 4 * 64 if spec.mlp.intermediate_size == 4 * spec.hidden_size else 96
    return dataclasses.replace(
        spec,
        **changes,
        vocab_size=vocab_size,
        hidden_size=64,
        num_layers=num_layers,
        attention=_tiny_attention(spec.attention),
        mlp=dataclasses.replace(spec.mlp, intermediate_size=inner),
        moe=moe,
        window=None if spec.window is None else spec.window[:num_layers],
    )


def _tiny_attention(attention: GQA | MLA) -> GQA | MLA:
    if isinstance(attention, MLA):
        return dataclasses.replace(
            attention,
            num_heads=4,
            q_lora_rank=None if attention.q_lora_rank is None else 24,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
        )
    kv_heads = 4 if attention.num_kv_heads == attention.num_heads else 2
    return dataclasses.replace(attention, num_heads=4, num_kv_heads=kv_heads, head_dim=16)


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
    cls.__name__: cls
    for cls in (
        *(ModelSpec, GQA, MLA, MLP, MoE, BalanceLosses, Norm, Head, LogN),
        *(Rope, Rope2D, Alibi, LearnedBlock, LinearScaling, DynamicNTK, ChunkedNTK, Yarn),
        *(PreNorm, DeepNorm, SandwichNorm),
    )
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
