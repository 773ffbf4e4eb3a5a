"""What the training step asks of a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from jaxllm.config import RunConfig
from jaxllm.errors import InputError
from jaxllm.train.forward import Forward
from jaxllm.train.tuning import Tuning
from jaxllm.types import Batch, Params

Sums = dict[str, jax.Array]
"""Sums over rows, by name; they add up over microbatches and over the batches of an evaluation."""


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
        raise InputError("adapter: needs weights to stand beside; found neither model.weights nor --init-from")
    return fresh(), None


class Objective(Protocol):
    """A loss over batches of one type, as sums over rows, so that gradient accumulation stays exact.

    Attributes:
      moves_reference: the state holds a reference that changes during the run, see `TrainState.reference`.
    """

    moves_reference: bool

    @classmethod
    def from_config(cls, config: RunConfig, forward: Forward) -> Objective:
        """Build the objective of a run; raises InputError for options that do not fit the model."""

    def declarations(self) -> Any:
        """Return the declarations of what is trained, a tree of `nn.param.Declared`."""

    def frozen_declarations(self) -> Any | None:
        """Return the declarations of what else the step reads: the base of an adapter, a reference; or None."""

    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return what is trained and what is frozen at the start of a run.

        Args:
          fresh: draws what `declarations` say.
        """

    def abstract_batch(self, rows: Batch, array: Callable[[tuple[int, ...], Any], jax.ShapeDtypeStruct]) -> Any:
        """Return the shapes of a batch; `rows` [B, T] are given, `array(shape, dtype)` makes others split by rows."""

    def totals(self, batch: Any) -> Sums:
        """Return sums over a global batch that the loss is relative to; "weight" divides loss and gradients."""

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

    def metrics(self, parts: Sums, totals: Sums) -> dict[str, jax.Array]:
        """Return what is recorded of added up parts and totals; "loss" is the measure that is drawn."""

    @property
    def draws(self) -> bool:
        """Whether the loss is random: dropout, noise, experts' capacity."""

    def learning_rates(self, rate: jax.Array, step: jax.Array) -> Any:
        """Return the learning rate of all parameters, or one for each entry of the parameters."""
