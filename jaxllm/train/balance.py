"""The balance losses of a mixture of experts, as its spec weighs them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.losses.moe import balance_loss
from jaxllm.nn.moe import RoutingStatistics
from jaxllm.spec import MoE


def balance_losses(moe: MoE, statistics: RoutingStatistics) -> jax.Array:
    """Return the sum over the layers of DeepSeek-V2's weighted balance losses, float32 [].

    Args:
      statistics: stacked over the mixture layers.
    """
    layers = balance_loss(
        statistics.load,
        statistics.mean_probs,
        statistics.sent,
        statistics.num_tokens,
        devices_per_token=moe.topk_groups,
        expert=moe.balance.expert,
        device=moe.balance.device,
        communication=moe.balance.communication,
        per_sequence=moe.balance.per_sequence,
    )
    return jnp.sum(layers)
