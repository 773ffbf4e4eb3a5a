"""Reward models: a score for an answer, learned from pairs of which one is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.config.alignment import RankingConfig
from jaxllm.errors import InputError
from jaxllm.losses.lm import chunked_cross_entropy
from jaxllm.losses.reward import center_loss, focal_ranking_loss, log_barrier, ranking_loss
from jaxllm.nn import score
from jaxllm.nn.decoder import head_kernel
from jaxllm.sharding.rules import ROWS
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.base import Objective, Sums, Weights, place
from jaxllm.train.objectives.pairs import (
    abstract_pairs,
    at_ends,
    is_chosen,
    pair_totals,
    pairs_in_row,
    preference_metrics,
    preference_parts,
)
from jaxllm.train.tuning.headless import Headless
from jaxllm.types import Batch, Params, PreferenceBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModeling(Objective):
    """A ranking loss of the scores at the last tokens of two answers, as a mean over pairs.

    Parameters are {"model", "score"}; the model has its output matrix only for the language-modelling term.

    Attributes:
      pairs_per_row: pairs that a row has room for.
    """

    ranking: RankingConfig
    pairs_per_row: int

    @classmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> RewardModeling:
        """Build the objective of the stage reward."""
        tuning = forward.tuning if config.ranking.language_modeling else Headless(forward.tuning)
        forward = dataclasses.replace(forward, tuning=tuning)
        return cls(forward=forward, ranking=config.ranking, pairs_per_row=pairs_in_row(config))

    def declarations(self) -> Any:
        """Return what the tuning trains, and the scalar head."""
        return {"model": self.forward.tuning.trained(), "score": score.declarations(self.forward.spec)}

    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return the weights to start from; a reward model's score is kept."""
        found = weights.any_model()
        model = None if found is None else found["model"]
        needs_head = self.ranking.language_modeling and not self.forward.spec.head.tie_word_embeddings
        if found is not None and needs_head and "head" not in model:
            raise InputError(
                "ranking.language_modeling: found a reward model without an output matrix to start from; expected 0, "
                "or a language model"
            )
        trained, frozen = place(
            self.forward.tuning, lambda: fresh()["model"], model, weights.adapter(self.forward.tuning)
        )
        kept = None if found is None else found.get("score")
        return {"model": trained, "score": fresh()["score"] if kept is None else kept}, frozen

    def abstract_batch(self, rows: Batch, array: Callable) -> PreferenceBatch:
        """Return rows of pairs."""
        return abstract_pairs(rows, array, self.pairs_per_row)

    def totals(self, batch: PreferenceBatch) -> Sums:
        """Return the pairs, and the trained tokens of chosen answers."""
        return pair_totals(batch)

    def loss_sums(
        self,
        params: Params,
        frozen: Params | None,
        batch: PreferenceBatch,
        totals: Sums,
        *,
        train: bool,
        step: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Sums]:
        """Return the sum of the training loss over pairs, and sums of its parts and of what scores say."""
        values, entropies = self._values(params, frozen, batch, train=train, row_keys=row_keys)
        scores = at_ends(values, batch)
        losses = self.pair_losses(scores, batch.margins)
        sums = {name: jnp.sum(batch.pair_weights * each) for name, (_, each) in losses.items()}
        loss = sum(weight * sums[name] for name, (weight, _) in losses.items())
        if entropies is not None:
            sums["chosen_loss"] = jnp.sum(entropies)
            # A mean over tokens beside means over pairs, which the step divides all by pairs.
            loss += self.ranking.language_modeling * sums["chosen_loss"] * totals["weight"] / totals["chosen_tokens"]
        return loss, sums | preference_parts(scores, batch, by_level=step is None)

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return loss, the ranking loss of a pair, and what scores say; the loss's other parts where they count."""
        metrics = {"loss": parts["ranking"] / totals["weight"]} | preference_metrics(parts, totals)
        metrics |= {name: parts[name] / totals["weight"] for name in ("barrier", "center") if name in parts}
        if "chosen_loss" in parts:
            metrics["language_modeling_loss"] = parts["chosen_loss"] / totals["chosen_tokens"]
        return metrics

    def pair_losses(self, scores: jax.Array, margins: jax.Array) -> dict[str, tuple[float, jax.Array]]:
        """Return the parts of each pair's loss by name, each with its weight and its values [B, K].

        The barrier is the sum over both scores of a pair, as InternLM's own code has it (xtuner/model/reward.py); the
        paper does not say whether it is a sum or a mean.

        Args:
          scores: [B, K, 2]. margins: [B, K].
        """
        options, chosen, rejected = self.ranking, scores[..., 0], scores[..., 1]
        if options.loss == "focal":
            parts = {"ranking": (1.0, focal_ranking_loss(chosen, rejected, options.gamma))}
        else:
            parts = {"ranking": (1.0, ranking_loss(chosen, rejected, margins))}
        if options.barrier:
            barrier = jnp.sum(log_barrier(scores, options.barrier_bound), axis=-1)
            parts["barrier"] = (options.barrier, barrier)
        if options.center:
            parts["center"] = (options.center, center_loss(chosen, rejected))
        return parts

    def _values(
        self, params: Params, frozen: Params | None, batch: PreferenceBatch, *, train: bool, row_keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the scores of all slots and, for the language-modelling term, the cross-entropies, [B, T] each."""
        forward = self.forward

        def run(params: Params, frozen: Params | None, rows: Any, head: Params) -> tuple[jax.Array, jax.Array | None]:
            rows, trained, row_keys = rows
            output, model, adapter = forward.output(params, frozen, rows, train=train, row_keys=row_keys)
            values = score.evaluate(head, output.hidden)
            if not self.ranking.language_modeling:
                return values, None
            kernel = head_kernel(forward.spec, model, output.hidden.dtype, adapter)
            return values, chunked_cross_entropy(output.hidden, kernel, rows.targets, trained, chunk=forward.chunk)

        trained = batch.rows.loss_weights * is_chosen(batch)
        rows = (batch.rows, trained, row_keys)
        return forward.map_rows(run, (ROWS, ROWS))(params["model"], frozen, rows, params["score"])
