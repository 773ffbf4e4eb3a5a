"""What the objectives of preference pairs share: sums over answers, and how often the better one is told."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.data.example_rows import LEVELS
from jaxllm.train.objectives.base import Sums
from jaxllm.types import Batch, PreferenceBatch


def pairs_in_row(config: RunConfig) -> int:
    """Return K, the pairs that a row has room for."""
    return config.data.pairs_per_row if config.data.packing == "packed" else 1


def abstract_pairs(rows: Batch, array: Callable, most: int, *, with_reference: bool = False) -> PreferenceBatch:
    """Return the shapes of a batch, see `Objective.abstract_batch`; `most` are the pairs in a row."""
    each = (rows.num_rows, most)
    return PreferenceBatch(
        rows=rows,
        ends=array((*each, 2), jnp.int32),
        margins=array(each, jnp.float32),
        pair_weights=array(each, jnp.float32),
        levels=array(each, jnp.int32),
        ref_logps=array((*each, 2), jnp.float32) if with_reference else None,
    )


def at_ends(values: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """Return the values [B, T] at the last token of each answer, [B, K, 2]."""
    flat = batch.ends.reshape(batch.num_rows, -1)
    return jnp.take_along_axis(values, flat, axis=1).reshape(batch.ends.shape)


def answer_sums(values: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """Return the sums of values [B, T] over the segments of each answer, [B, K, 2]."""
    numbers = 1 + jnp.arange(batch.ends.shape[1] * 2)
    # Not as a matrix product, which rounds to bfloat16 on TPU.
    within = batch.rows.segment_ids[:, None, :] == numbers[None, :, None]
    return jnp.sum(jnp.where(within, values[:, None, :], 0), axis=-1).reshape(batch.ends.shape)


def is_chosen(batch: PreferenceBatch) -> jax.Array:
    """Return where tokens belong to chosen answers or their prompts, bool [B, T]."""
    return batch.rows.segment_ids % 2 == 1


def pair_totals(batch: PreferenceBatch) -> Sums:
    """Return the pairs, as the weight, and the trained tokens of chosen answers."""
    chosen_tokens = jnp.sum(batch.rows.loss_weights * is_chosen(batch))
    return {"weight": jnp.sum(batch.pair_weights), "chosen_tokens": chosen_tokens}


def preference_parts(rewards: jax.Array, batch: PreferenceBatch, *, by_level: bool) -> Sums:
    """Return sums over pairs of what their rewards [B, K, 2] say.

    Args:
      by_level: also count pairs and right ones for each of `LEVELS`; in evaluation, where each has some.
    """
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    weights = batch.pair_weights
    right = weights * (chosen > rejected)
    parts = {
        "right": jnp.sum(right),
        "margin": jnp.sum(weights * (chosen - rejected)),
        "chosen": jnp.sum(weights * chosen),
        "rejected": jnp.sum(weights * rejected),
    }
    if by_level and batch.levels is not None:
        of_level = batch.levels[..., None] == jnp.arange(len(LEVELS))[None, None]
        counted = {"level_right": right, "level_weight": weights}
        parts |= {name: jnp.sum(jnp.where(of_level, each[..., None], 0), (0, 1)) for name, each in counted.items()}
    return parts


def preference_metrics(parts: Sums, totals: Sums) -> dict[str, jax.Array]:
    """Return accuracy, margin, chosen_reward and rejected_reward, and the accuracy of each level that has pairs."""
    weight = totals["weight"]
    metrics = {
        "accuracy": parts["right"] / weight,
        "margin": parts["margin"] / weight,
        "chosen_reward": parts["chosen"] / weight,
        "rejected_reward": parts["rejected"] / weight,
    }
    if "level_weight" in parts:
        for name, right, counted in zip(LEVELS, parts["level_right"], parts["level_weight"], strict=True):
            if counted:
                metrics[f"accuracy_{name}"] = right / counted
    return metrics
