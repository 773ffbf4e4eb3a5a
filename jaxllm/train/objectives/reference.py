"""The reference that a policy is kept near to: what it computes, and where its weights lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.spec import ModelSpec
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.base import Weights
from jaxllm.train.tuning import FullTuning, Tuning
from jaxllm.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class WithoutAdapter:
    """A tuned model as it was: the frozen weights of `tuning` alone."""

    tuning: Tuning
    draws: bool = dataclasses.field(default=False, init=False)

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.tuning.spec

    def trained(self) -> Any:
        """Return what is trained, of which nothing is used."""
        return self.tuning.trained()

    def frozen(self) -> Any | None:
        """Return what is frozen."""
        return self.tuning.frozen()

    def join(self, trained: Params, frozen: Params | None) -> tuple[Params, None]:
        """Return the frozen parameters, without an adapter."""
        return self.tuning.join(trained, frozen)[0], None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A model that does not change during the run.

    Its weights are a tree of their own beside what the policy has frozen, unless the policy is an adapter beside just
    these weights: then they are not held twice.

    Attributes:
      forward: the model.
      path: where its weights come from; None: from where the policy's do.
      is_base: it is what the policy's adapter stands beside.
    """

    forward: Forward
    path: str | None
    is_base: bool

    @classmethod
    def create(cls, policy: Forward, adapter: AdapterConfig | None, path: str | None) -> Reference:
        """Return the reference of a policy.

        Args:
          path: of its weights; None: those that the run starts from.
        """
        is_base = path is None and adapter is not None and adapter.kind != "partial"
        tuning = WithoutAdapter(policy.tuning) if is_base else FullTuning(policy.spec)
        return cls(forward=dataclasses.replace(policy, tuning=tuning), path=path, is_base=is_base)

    def declarations(self) -> Any | None:
        """Return the declarations of weights of its own; None: it has none."""
        return None if self.is_base else self.forward.tuning.trained()

    def place(self, weights: Weights) -> Params | None:
        """Return weights of its own; raises InputError where there are none to start from."""
        if self.is_base:
            return None
        params = weights.model(self.path)
        if params is None:
            raise InputError("model.weights: found none, but the run needs a reference; name a model to start from")
        return params

    def token_logps(
        self, params: Params, frozen: Params | None, own: Params | None, batch: Batch, *, temperature: float = 1.0
    ) -> jax.Array:
        """Return the log-probabilities of the targets, see `Forward.token_logps`.

        Args:
          params, frozen: of the policy. own: what `place` returned.
        """
        weights = (params, frozen) if self.is_base else (own, None)
        return self.forward.token_logps(*weights, batch, train=True, temperature=temperature)
