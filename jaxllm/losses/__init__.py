"""Losses: plain functions on arrays that know no model."""

from jaxllm.losses.lm import chunked_cross_entropy, chunked_loss_sums, cross_entropy, max_z_loss, z_loss
from jaxllm.losses.moe import (
    balance_loss,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    load_balancing_loss,
    router_z_loss,
)

__all__ = [
    "balance_loss",
    "chunked_cross_entropy",
    "chunked_loss_sums",
    "communication_balance_loss",
    "cross_entropy",
    "device_balance_loss",
    "expert_balance_loss",
    "load_balancing_loss",
    "max_z_loss",
    "router_z_loss",
    "z_loss",
]
