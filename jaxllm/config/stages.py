"""The stages after pretraining, by what they learn from."""

PAIR_STAGES = ("reward", "dpo")
"""From pairs of answers."""

POLICY_STAGES = ("ppo", "grpo")
"""From answers that the policy gives to prompts."""
