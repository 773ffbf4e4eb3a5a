"""Rewards: plain Python functions of sampled answers that know no model."""

from jaxllm.rewards.base import Completion, Reward, RewardFunction
from jaxllm.rewards.gym_tasks import gym_rows
from jaxllm.rewards.make import make_reward

__all__ = ["Completion", "Reward", "RewardFunction", "gym_rows", "make_reward"]
