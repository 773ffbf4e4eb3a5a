"""jaxllm: train and align language models in JAX.

The public names are loaded when they are first used, so that `import jaxllm` is quick and imports no jax.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxllm.errors import InputError

# Imported here and now, because these two functions share their names with submodules: importing a submodule binds its
# name on the package once, and what is bound afterwards stays.
from jaxllm.families import families, spec

__version__ = "0.1.0"

_HOMES = {
    "Batch": "jaxllm.types",
    "LanguageModel": "jaxllm.language_model",
    "ModelOutput": "jaxllm.types",
    "ModelSpec": "jaxllm.spec",
    "RewardModel": "jaxllm.reward_model",
    "apply": "jaxllm.nn.model",
    "count_active_params": "jaxllm.nn.model",
    "count_params": "jaxllm.nn.model",
    "init": "jaxllm.nn.model",
    "load": "jaxllm.pretrained",
    "load_pretrained": "jaxllm.pretrained",
    "load_reward_model": "jaxllm.pretrained",
}

__all__ = ["InputError", "__version__", "families", "losses", "spec", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("jaxllm.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
