"""Losses: plain functions on arrays that know no model."""

from jaxllm.losses.dpo import dpo_loss, implicit_rewards
from jaxllm.losses.grpo import (
    group_advantages,
    grpo_loss,
    grpo_terms,
    grpo_weights,
    k1_kl,
    k2_kl,
    k3_kl,
    process_advantages,
)
from jaxllm.losses.lm import chunked_cross_entropy, chunked_loss_sums, cross_entropy, max_z_loss, z_loss
from jaxllm.losses.masked import masked_mean, sequence_logps
from jaxllm.losses.moe import (
    balance_loss,
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    load_balancing_loss,
    router_z_loss,
)
from jaxllm.losses.ppo import (
    RunningMoments,
    gae,
    kl_rewards,
    llama2_scores,
    policy_loss,
    policy_terms,
    value_loss,
    value_terms,
    whiten,
)
from jaxllm.losses.reward import (
    LLAMA2_MARGINS,
    center_loss,
    focal_ranking_loss,
    log_barrier,
    ranking_loss,
)

__all__ = [
    "LLAMA2_MARGINS",
    "RunningMoments",
    "balance_loss",
    "center_loss",
    "chunked_cross_entropy",
    "chunked_loss_sums",
    "communication_balance_loss",
    "cross_entropy",
    "device_balance_loss",
    "dpo_loss",
    "expert_balance_loss",
    "focal_ranking_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "grpo_terms",
    "grpo_weights",
    "implicit_rewards",
    "k1_kl",
    "k2_kl",
    "k3_kl",
    "kl_rewards",
    "llama2_scores",
    "load_balancing_loss",
    "log_barrier",
    "masked_mean",
    "max_z_loss",
    "policy_loss",
    "policy_terms",
    "process_advantages",
    "ranking_loss",
    "router_z_loss",
    "sequence_logps",
    "value_loss",
    "value_terms",
    "whiten",
    "z_loss",
]
