"""What a trained token costs where not all of a model is trained."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax

from jaxllm.nn.model import count_matmul_params
from jaxllm.nn.param import Declared, Kind, is_declared
from jaxllm.spec import ModelSpec
from jaxllm.train.flops import model_flops_per_token
from jaxllm.train.tuning.base import Tuning
from jaxllm.train.tuning.headless import Headless


def tuned_flops_per_token(tuning: Tuning, seq_len: int) -> float:
    """Return the FLOPs of one trained token, forward and backward, in rows of `seq_len` tokens.

    A parameter that is trained costs 6, a frozen one 4, for it has no gradient, and an output matrix that is not there
    nothing; attention is that of `flops.model_flops_per_token`. Prefixes, which no token multiplies, count nothing.
    """
    spec, flops = tuning.spec, model_flops_per_token(tuning.spec, seq_len)
    matrices = count_matmul_params(spec)
    if isinstance(tuning, Headless):
        flops -= 6 * spec.vocab_size * spec.hidden_size
        matrices -= spec.vocab_size * spec.hidden_size
    if tuning.frozen() is None:
        return flops
    leaves = jax.tree.leaves(tuning.trained(), is_leaf=is_declared)
    own, low_rank = (_sizes(spec, leaves, kinds) for kinds in (("matrix", "output"), ("uniform", "zero_matrix")))
    return flops - 2 * (matrices - own) + 6 * low_rank


def _sizes(spec: ModelSpec, leaves: Collection[Declared], kinds: Collection[Kind]) -> int:
    """Count the parameters of some kinds that multiply a token: of experts those that it selects."""
    total = 0
    for leaf in leaves:
        if leaf.kind in kinds and ("lora" in leaf.axes or leaf.kind in ("matrix", "output")):
            share = spec.moe.num_experts_per_tok / spec.moe.num_experts if "experts" in leaf.axes else 1
            total += int(math.prod(leaf.value.shape) * share)
    return total
