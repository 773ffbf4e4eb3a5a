"""Rules between the options of the stages that learn from sampled answers."""

import dataclasses

import pytest

from jaxllm.config import BatchRampConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig, validate
from jaxllm.config.alignment import GRPOConfig, PPOConfig, RewardConfig, RolloutConfig

SOURCES = [SourceConfig(path="a")]
CONFIG = RunConfig(
    run_dir="r",
    tokenizer="t",
    stage="grpo",
    model=ModelConfig(name="m"),
    data=DataConfig(train=SOURCES, seq_len=16),
    train=TrainConfig(steps=12, batch_size=8),
    rollout=RolloutConfig(prompts=4, samples=4, max_new_tokens=8, epochs=2),
    rewards=[RewardConfig(kind="math"), RewardConfig(kind="function", path="m:f")],
)


def rollout(**options):
    return {"rollout": dataclasses.replace(CONFIG.rollout, **options)}


def reward(**options):
    return {"rewards": [RewardConfig(**options)]}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"stage": "ppo", **rollout(samples=2)},
        {"grpo": GRPOConfig(reference_every=3)},
        {
            "rewards": [
                RewardConfig(kind="model", path="rm", system="Be safe."),
                RewardConfig(kind="regex", name="f", pattern="a"),
            ]
        },
        {
            "stage": "ppo",
            "ppo": PPOConfig(combine="llama2", pretrain_weight=0.5),
            "data": DataConfig(train=SOURCES, pretrain=SOURCES, seq_len=16),
            "rewards": [RewardConfig(kind="model", path="rm", name=name) for name in ("safety", "helpfulness")],
        },
    ],
)
def test_sound_configs_have_no_violations(sections):
    assert validate(dataclasses.replace(CONFIG, **sections)) == []


@pytest.mark.parametrize(
    ("sections", "violation"),
    [
        (
            {"stage": "sft", "rewards": []},
            "rollout.prompts: only stages 'ppo' and 'grpo' sample answers; expected none with stage 'sft'",
        ),
        (
            {"stage": "sft", "rollout": None},
            "rewards.0.kind: only stages 'ppo' and 'grpo' sample answers; expected none with stage 'sft'",
        ),
        (reward(kind="regex"), "rewards.0.pattern: missing; kind 'regex' needs it"),
        (
            reward(kind="regex", pattern="(a"),
            "rewards.0.pattern: '(a' is no regular expression: missing ) at position 2",
        ),
        (
            reward(kind="exact", pattern="a"),
            "rewards.0.pattern: 'a' has no group; expected one around the answer, as in 'A: (.*)'",
        ),
        (
            reward(kind="repetition", pattern="a"),
            "rewards.0.pattern: kind 'repetition' has no pattern; expected null, found 'a'",
        ),
        (reward(kind="length"), "rewards.0.target: missing; kind 'length' needs it"),
        (reward(kind="math", target=3), "rewards.0.target: kind 'math' has no target"),
        (
            reward(kind="code"),
            "rewards.0.allow_code: kind 'code' runs what the model wrote on this machine, held back by limits but in "
            "no security sandbox; expected true",
        ),
        (reward(kind="function", path="f"), "rewards.0.path: expected package.module:function, found 'f'"),
        ({"rollout": None}, "rollout: missing; stage 'grpo' needs it (prompts, samples, max_new_tokens)"),
        ({"rewards": []}, "rewards: expected at least one, found none; stage 'grpo' learns from nothing else"),
        (
            rollout(samples=3),
            "rollout.prompts: expected prompts x samples to be a multiple of train.batch_size (8), found 4 x 3",
        ),
        (
            {"train": TrainConfig(steps=10, batch_size=8)},
            "train.steps: expected a multiple of the 4 updates of a round, found 10",
        ),
        (
            {"train": TrainConfig(steps=12, batch_size=8, batch_ramp=BatchRampConfig(start=4, increment=4, samples=8))},
            "train.batch_ramp.start: stage 'grpo' has batches of one size; expected train.batch_ramp null",
        ),
        (
            rollout(max_new_tokens=16),
            "rollout.max_new_tokens: expected less than data.seq_len (16), as a prompt comes first, found 16",
        ),
        (
            rollout(prompts=16, samples=1),
            "rollout.samples: stage 'grpo' compares answers to the same prompt; expected at least 2, found 1",
        ),
        (
            {"grpo": GRPOConfig(reference_every=2), **rollout(reference_weights="x")},
            "grpo.reference_every: the reference begins as the policy; expected rollout.reference_weights null, or "
            "this null",
        ),
        (
            {"grpo": GRPOConfig(reference_every=2, kl_coef=0.0)},
            "grpo.reference_every: expected null with grpo.kl_coef 0, found 2",
        ),
        (
            {"stage": "ppo", "ppo": PPOConfig(pretrain_weight=0.5)},
            "ppo.pretrain_weight: expected 0 without data.pretrain, found 0.5",
        ),
        (
            {"data": DataConfig(train=SOURCES, pretrain=SOURCES, seq_len=16)},
            "data.pretrain.0.path: only stage 'ppo' with a ppo.pretrain_weight reads data.pretrain; expected []",
        ),
        (
            {"train": TrainConfig(steps=12, batch_size=8, z_loss=1e-4)},
            "train.z_loss: stage 'grpo' has no such loss; found 0.0001",
        ),
        (
            {"rewards": [RewardConfig(kind="function")]},
            "rewards.0.path: missing; kinds 'model' and 'function' need it",
        ),
        ({"rewards": [RewardConfig(kind="math", path="x")]}, "rewards.0.path: kind 'math' has no path"),
        (
            {"rewards": [RewardConfig(kind="math", system="x")]},
            "rewards.0.system: only kind 'model' reads a system message; expected null with kind 'math'",
        ),
        (
            {"rewards": [RewardConfig(kind="math"), RewardConfig(kind="math")]},
            "rewards.1.name: expected another name than that of rewards.0, found 'math'",
        ),
        (
            {"stage": "ppo", "ppo": PPOConfig(combine="llama2")},
            "ppo.combine: 'llama2' needs rewards named safety and helpfulness; found math, function",
        ),
    ],
)
def test_broken_rules_are_told_by_option(sections, violation):
    assert validate(dataclasses.replace(CONFIG, **sections)) == [violation]
