"""What the policy stages are made of: what answers prompts and judges the answers, and where batches come from."""

from __future__ import annotations

from jaxllm.data.example_set import ExampleSet
from jaxllm.data.loader import TrainLoader, boundary_ids
from jaxllm.data.shards import ShardSet
from jaxllm.errors import InputError
from jaxllm.rewards import make_reward
from jaxllm.sharding.rules import batch_ways
from jaxllm.train.rollouts.answers import Respondent
from jaxllm.train.rollouts.reward_model import ModelReward
from jaxllm.train.rollouts.reward_sum import part_name
from jaxllm.train.rollouts.source import RolloutSource
from jaxllm.train.setup import Opened, Setup, example_length
from jaxllm.train.weights import RunWeights


def make_rollouts(setup: Setup, opened: Opened, weights: RunWeights) -> RolloutSource:
    """Build where the batches of a policy stage come from, at the beginning.

    Raises:
      InputError: rewards that cannot be made, or answers that do not fit rows, model or mesh.
    """
    respondent = make_respondent(setup, weights)
    return RolloutSource(
        setup, _prompt_loader(setup, opened.training), respondent, _text_loader(setup, opened.pretrain)
    )


def _prompt_loader(setup: Setup, prompts: list[ExampleSet]) -> TrainLoader:
    """Open the prompts as one lane, which every process reads."""
    config = setup.config
    return TrainLoader(
        prompts,
        [source.weight for source in config.data.train],
        seq_len=example_length(config),
        packing=setup.packing,
        num_lanes=1,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


def _text_loader(setup: Setup, texts: list[ShardSet]) -> TrainLoader | None:
    """Open the texts that are mixed in, in the same way; None where none are."""
    config, ppo = setup.config, setup.config.ppo
    if config.stage != "ppo" or not ppo.pretrain_weight:
        return None
    microbatches = batch_ways(setup.mesh) * config.train.grad_accum
    if ppo.pretrain_rows % microbatches:
        raise InputError(
            f"ppo.pretrain_rows: {ppo.pretrain_rows} rows cannot be split over {batch_ways(setup.mesh)} ways of data "
            f"parallelism times train.grad_accum {config.train.grad_accum}"
        )
    start_id, eos_id = boundary_ids(setup.tokenizer)
    return TrainLoader(
        texts,
        [source.weight for source in config.data.pretrain],
        seq_len=config.data.seq_len,
        packing="packed",
        num_lanes=1,
        seed=config.seed,
        shuffle=config.data.shuffle,
        start_id=start_id,
        eos_id=eos_id,
    )


def make_respondent(setup: Setup, weights: RunWeights) -> Respondent:
    """Build what answers prompts and judges the answers.

    Raises:
      InputError: rewards that cannot be made, or answers that do not fit rows, model or mesh.
    """
    config, encoder = setup.config, setup.encoder
    sampler = setup.sampler(
        encoder.stop_ids(),
        num_ids=min(setup.tokenizer.vocab_size, setup.spec.vocab_size),
        prefix_ids=encoder.places.prefix_ids,
    )
    functions = {part_name(reward): make_reward(reward) for reward in config.rewards if reward.kind != "model"}
    models = {
        part_name(reward): ModelReward(setup, weights, reward.path, reward.system)
        for reward in config.rewards
        if reward.kind == "model"
    }
    return Respondent(
        feed=setup.feed,
        encoder=encoder,
        sampler=sampler,
        rewards=config.rewards,
        functions=functions,
        models=models,
        combine=config.ppo.combine,
    )
