"""What the stages minimise: one objective each."""

from __future__ import annotations

from jaxllm.train.objectives.actor_critic import ActorCritic
from jaxllm.train.objectives.base import Objective
from jaxllm.train.objectives.dpo import DirectPreference
from jaxllm.train.objectives.language_modeling import LanguageModeling
from jaxllm.train.objectives.policy import GroupPolicy
from jaxllm.train.objectives.reward import RewardModeling

OBJECTIVES: dict[str, type[Objective]] = {
    "pretrain": LanguageModeling,
    "sft": LanguageModeling,
    "reward": RewardModeling,
    "dpo": DirectPreference,
    "ppo": ActorCritic,
    "grpo": GroupPolicy,
}
"""Stage -> its objective."""
