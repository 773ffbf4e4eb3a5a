"""The registry of model families: data only."""

from __future__ import annotations

import difflib
from typing import Any

from jaxllm.errors import InputError
from jaxllm.families.baichuan import BAICHUAN
from jaxllm.families.base import Family
from jaxllm.families.chatglm import CHATGLM
from jaxllm.families.chatglm2 import CHATGLM2
from jaxllm.families.deepseek import DEEPSEEK
from jaxllm.families.deepseek_v2 import DEEPSEEK_V2
from jaxllm.families.glm import GLM
from jaxllm.families.glm4 import GLM4, GLM4_REMOTE
from jaxllm.families.glm130b import GLM130B
from jaxllm.families.internlm import INTERNLM
from jaxllm.families.internlm2 import INTERNLM2
from jaxllm.families.llama import LLAMA
from jaxllm.families.qwen import QWEN
from jaxllm.families.qwen2 import QWEN2
from jaxllm.spec import ModelSpec

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, QWEN, QWEN2, BAICHUAN, INTERNLM, INTERNLM2, DEEPSEEK, DEEPSEEK_V2),
    *(GLM, GLM130B, CHATGLM, GLM4, CHATGLM2, GLM4_REMOTE),
)
"""Where several can express a model that was trained here, the first one counts: the layout that most tools read."""


def families() -> dict[str, tuple[str, ...]]:
    """Return each family's name with the names of its sizes."""
    return {family.name: tuple(family.sizes) for family in FAMILIES if family.sizes}


def spec(name: str) -> ModelSpec:
    """Return the spec of a size such as "qwen-7b".

    Raises:
      InputError: unknown name, with the nearest ones.
    """
    sizes = {size: family.sizes[size] for family in FAMILIES for size in family.sizes}
    if name not in sizes:
        near = difflib.get_close_matches(name, sizes, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise InputError(f"unknown model {name!r}{hint} (known: {', '.join(sizes)})")
    return sizes[name]


def find_family(config: dict[str, Any]) -> Family | None:
    """Return the family of a published config, None if no family has its architecture."""
    # A family with a condition of its own is the more special one.
    ordered = sorted(FAMILIES, key=lambda family: family.matches is None)
    return next((family for family in ordered if family.accepts(config)), None)


def family_of_config(config: dict[str, Any], source: str = "config.json") -> Family:
    """Find the family of a published config by its "architectures" (or, without those, its "model_type").

    Raises:
      InputError: no such key, or an architecture that no family has.
    """
    if (family := find_family(config)) is not None:
        return family
    known = sorted({name for family in FAMILIES for name in family.architectures + family.model_types})
    found = f"architectures = {config.get('architectures')!r}, model_type = {config.get('model_type')!r}"
    raise InputError(f"{source}: {found} is not supported; expected one of {', '.join(known)}")


def family_of_spec(model: ModelSpec) -> Family:
    """Find a family whose published config can express a spec.

    Raises:
      InputError: none can.
    """
    reasons = []
    for family in FAMILIES:
        try:
            family.to_hf(model)
        except InputError as error:
            reasons.append(f"{family.name}: {error}")
        else:
            return family
    raise InputError("no published layout can express this model: " + "; ".join(reasons))
