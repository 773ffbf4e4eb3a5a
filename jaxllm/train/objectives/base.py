"""What the training step asks of a stage."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.errors import InputError
from jaxllm.train.forward import Forward
from jaxllm.train.tuning import Tuning
from jaxllm.train.tuning.cost import tuned_flops_per_token
from jaxllm.types import Batch, Params

Sums = dict[str, jax.Array]
"""Sums over rows, by name; they add up over microbatches and over the batches of an evaluation."""

LARGEST = "largest_"
"""Of what a training step sums, names that begin so are of the largest value in any row instead."""


def joined(parts: Sums, others: Sums) -> Sums:
    """Return what two microbatches say of both."""
    return {
        name: (jnp.maximum if name.startswith(LARGEST) else jnp.add)(part, others[name]) for name, part in parts.items()
    }


class Weights(Protocol):
    """Where a run's weights come from; each is read when it is asked for, straight onto the mesh."""

    def model(self, path: str | None = None) -> Params | None:
        """Return the parameters of a whole model in float32, adapters merged; by default those the run starts from.

        Returns None where the run starts from random weights.
        """

    def reward_model(self, path: str) -> Params:
        """Return {"model", "score"} of a run with a reward model; raises InputError for one without a score."""

    def any_model(self) -> Params | None:
        """Return what the run starts from as {"model"}, with "score" where it is a reward model; None: it is drawn."""

    def adapter(self, tuning: Tuning) -> Params | None:
        """Return what `adapter.weights` gives a tuning to start from; None: it is drawn."""


def place(
    tuning: Tuning, fresh: Callable[[], Params], params: Params | None, adapter: Params | None = None
) -> tuple[Params, Params | None]:
    """Return what is trained and what is frozen of a model at the start of a run.

    Args:
      fresh: draws what is trained. params: the whole model's; None: they are drawn.
      adapter: what is trained beside frozen weights, if it goes on from somewhere.

    Raises:
      InputError: little is to be trained beside weights that are not there.
    """
    if params is not None:
        trained, frozen = jax.jit(tuning.split)(params)
        if trained is None:
            trained = fresh() if adapter is None else adapter
        return trained, frozen
    if tuning.frozen() is not None:
        raise InputError("model.weights: found none, but an adapter stands beside weights; name those of its model")
    return fresh(), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """A loss over batches of one type, as sums over rows, so that gradient accumulation stays exact.

    Attributes:
      forward: the model that is trained.
      clips_entries: each entry of the parameters is clipped by its own norm.
    """

    forward: Forward

    clips_entries: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> Objective:
        """Build the objective of a run; raises InputError for options that do not fit the model."""

    @property
    def moves_reference(self) -> bool:
        """Whether the state holds a reference that changes during the run, see `TrainState.reference`."""
        return False

    @property
    def draws(self) -> bool:
        """Whether the loss is random: dropout, noise, experts' capacity."""
        return self.forward.draws

    def declarations(self) -> Any:
        """Return the declarations of what is trained, a tree of `nn.param.Declared`."""
        return self.forward.tuning.trained()

    def frozen_declarations(self) -> Any | None:
        """Return the declarations of what else the step reads: the base of an adapter, a reference; or None."""
        return self.forward.tuning.frozen()

    def learning_rates(self, rate: jax.Array, step: jax.Array) -> Any:
        """Return the learning rate of all parameters, or one for each entry of the parameters."""
        del step
        return rate

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs that a token of a step in rows of `seq_len` tokens costs, see `train.flops`."""
        return tuned_flops_per_token(self.forward.tuning, seq_len)

    @abc.abstractmethod
    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return what is trained and what is frozen at the start of a run.

        Args:
          fresh: draws what `declarations` say.
        """

    @abc.abstractmethod
    def abstract_batch(self, rows: Batch, array: Callable[[tuple[int, ...], Any], jax.ShapeDtypeStruct]) -> Any:
        """Return the shapes of a batch; `rows` [B, T] are given, `array(shape, dtype)` makes others split by rows."""

    @abc.abstractmethod
    def totals(self, batch: Any) -> Sums:
        """Return sums over a global batch that the loss is relative to; "weight" divides loss and gradients."""

    @abc.abstractmethod
    def loss_sums(
        self,
        params: Params,
        frozen: Params | None,
        batch: Any,
        totals: Sums,
        *,
        train: bool,
        step: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Sums]:
        """Return (sum of the training loss, what is recorded beside it); only the first is differentiable.

        Args:
          batch: a microbatch. totals: those of the whole batch.
          step: int [], finished updates; None: an evaluation, without gradients.
          row_keys: uint32 [B, 2], a random key for each row; None where `draws` is False, and in evaluation.
        """

    @abc.abstractmethod
    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return what is recorded of added up parts and totals; "loss" is the measure that is drawn."""
