"""A model in the layout of another family, so that programs which know that family alone can serve it.

Parameters do not depend on a family. What the target cannot say is folded into the weights where that is exact, left
out where it only rules texts longer than those of training (with a note), and refused otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxllm.errors import InputError
from jaxllm.families.base import Family
from jaxllm.families.llama import LLAMA
from jaxllm.families.qwen2 import QWEN2
from jaxllm.nn.decoder import head_kernel
from jaxllm.spec import ChunkedNTK, DynamicNTK, Head, ModelSpec, Rope
from jaxllm.types import Params

TARGETS: dict[str, Family] = {"llama": LLAMA, "qwen2": QWEN2}


@dataclasses.dataclass(frozen=True)
class Expressed:
    """A model that a target family can say.

    Attributes:
      notes: what was left out, a sentence each.
    """

    spec: ModelSpec
    params: Params
    notes: tuple[str, ...]


def express_as(target: str, spec: ModelSpec, params: Params) -> Expressed:
    """Bring a model into the form that a target family has.

    Raises:
      InputError: the target is unknown, or has no place for a part of the model, which is named.
    """
    if target not in TARGETS:
        raise InputError(f"cannot write a model as {target!r}, expected one of {', '.join(TARGETS)}")
    spec, params = _fold_normalized_head(spec, params)
    notes: list[str] = []
    for leave_out in _LEFT_OUT:
        spec, note = leave_out(spec)
        notes += [note] if note else []
    TARGETS[target].to_hf(spec)
    return Expressed(spec, params, tuple(notes))


def _fold_normalized_head(spec: ModelSpec, params: Params) -> tuple[ModelSpec, Params]:
    """Normalise the head for good; the loss on its largest logit is of no use after training."""
    if spec.head.normalized:
        params = params | {"head": head_kernel(spec, params)}
    is_tied = spec.head.tie_word_embeddings and not spec.head.normalized
    return dataclasses.replace(spec, head=Head(tie_word_embeddings=is_tied)), params


def _leave_out_logn(spec: ModelSpec) -> tuple[ModelSpec, str | None]:
    if spec.logn is None:
        return spec, None
    note = f"left out: LogN scaling of queries beyond {spec.logn.train_length} tokens"
    return dataclasses.replace(spec, logn=None), note


def _leave_out_chunked_ntk(spec: ModelSpec) -> tuple[ModelSpec, str | None]:
    if not isinstance(spec.position, Rope) or not isinstance(spec.position.scaling, ChunkedNTK):
        return spec, None
    length = spec.position.scaling.train_length
    position = dataclasses.replace(spec.position, scaling=None)
    return dataclasses.replace(spec, position=position), f"left out: dynamic NTK scaling beyond {length} tokens"


def _leave_out_unrotated_cache(spec: ModelSpec) -> tuple[ModelSpec, str | None]:
    scaling = spec.position.scaling if isinstance(spec.position, Rope) else None
    if not isinstance(scaling, DynamicNTK) or scaling.cached_keys == "rotated":
        return spec, None
    position = dataclasses.replace(spec.position, scaling=dataclasses.replace(scaling, cached_keys="rotated"))
    note = f"changed: beyond {scaling.original_max_position} tokens cached keys are not rotated anew"
    return dataclasses.replace(spec, position=position), note


_LEFT_OUT: tuple[Callable[[ModelSpec], tuple[ModelSpec, str | None]], ...] = (
    _leave_out_logn,
    _leave_out_chunked_ntk,
    _leave_out_unrotated_cache,
)
