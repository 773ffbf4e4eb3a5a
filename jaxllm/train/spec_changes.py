"""What a run changes about its model: rules of positions and attention that have no weights."""

from __future__ import annotations

import dataclasses

from jaxllm.config import ModelConfig, RopeConfig, RopeScalingConfig
from jaxllm.errors import InputError
from jaxllm.spec import (
    MLA,
    ChunkedNTK,
    DynamicNTK,
    LearnedBlock,
    LinearScaling,
    LogN,
    ModelSpec,
    Rope,
    Rope2D,
    Yarn,
)


def change_spec(spec: ModelSpec, model: ModelConfig) -> ModelSpec:
    """Return the spec with the run's own positions, LogN, windows and length; options that are null change nothing.

    Raises:
      InputError: the model has no place for such a rule, or windows do not match its layers.
    """
    if model.rope is not None:
        spec = dataclasses.replace(spec, position=_change_rope(spec, model.rope, model.label))
    if model.logn is not None:
        spec = dataclasses.replace(spec, logn=_logn(spec, model.logn, model.label))
    if model.window is not None:
        if len(model.window) != spec.num_layers:
            raise InputError(
                f"model.window: found {len(model.window)} entries for {spec.num_layers} layers of {model.label}"
            )
        spec = dataclasses.replace(spec, window=tuple(model.window))
    if model.max_position_embeddings is not None:
        spec = _change_length(spec, model.max_position_embeddings, model.label)
    return spec


def _change_rope(spec: ModelSpec, changes: RopeConfig, name: str) -> Rope | Rope2D:
    position = spec.position
    if not isinstance(position, Rope | Rope2D):
        raise InputError(f"model.rope: model {name} has no rotary positions ({type(position).__name__}); expected null")
    if changes.theta is not None:
        position = dataclasses.replace(position, theta=changes.theta)
    if changes.scaling is None:
        return position
    if not isinstance(position, Rope):
        raise InputError(f"model.rope.scaling: model {name} has two positions for each token; expected null")
    if changes.scaling.mscale_all_dim and not isinstance(spec.attention, MLA):
        raise InputError(
            f"model.rope.scaling.mscale_all_dim: model {name} has no latent attention; expected null, "
            f"found {changes.scaling.mscale_all_dim}"
        )
    return dataclasses.replace(position, scaling=_scaling(changes.scaling))


def _scaling(given: RopeScalingConfig) -> LinearScaling | DynamicNTK | ChunkedNTK | Yarn | None:
    rest = ("cached_keys", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    options = {name: getattr(given, name) for name in rest if getattr(given, name) is not None}
    match given.kind:
        case "none":
            return None
        case "linear":
            return LinearScaling(factor=given.factor)
        case "dynamic":
            return DynamicNTK(factor=given.factor, original_max_position=given.original_length, **options)
        case "chunked":
            return ChunkedNTK(train_length=given.original_length)
        case "yarn":
            return Yarn(factor=given.factor, original_max_position=given.original_length, **options)


def _logn(spec: ModelSpec, given: int | str, name: str) -> LogN | None:
    if given == "none":
        return None
    if isinstance(spec.attention, MLA):
        raise InputError(f"model.logn: model {name} has latent attention, which LogN is not made for; expected null")
    return LogN(train_length=given)


def _change_length(spec: ModelSpec, length: int, name: str) -> ModelSpec:
    position = spec.position
    if isinstance(position, LearnedBlock):
        raise InputError(
            f"model.max_position_embeddings: model {name} has {position.num_positions} learned positions; expected null"
        )
    if isinstance(position, Rope) and position.table_length is not None:
        position = dataclasses.replace(position, table_length=length)
    return dataclasses.replace(spec, position=position, max_position_embeddings=length)
