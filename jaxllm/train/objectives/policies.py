"""What the objectives of policies share: where their weights lie, and what is known of sampled answers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.train.objectives.advantages import Judged, Measured
from jaxllm.train.objectives.base import Objective, Weights, place
from jaxllm.train.objectives.reference import Reference
from jaxllm.train.objectives.trees import part, present
from jaxllm.types import Batch, Params, RolloutBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective(Objective):
    """An objective that keeps a policy near a reference.

    Frozen lie {"policy": what its tuning leaves as it is, "reference": whole weights}, as far as there are any.

    Attributes:
      reference: runs beside the policy; None: there is none, or it lies elsewhere.
    """

    reference: Reference | None

    def frozen_declarations(self) -> Any | None:
        """Return what is frozen of the policy, and the weights that the reference has of its own."""
        return present(
            policy=self.forward.tuning.frozen(),
            reference=None if self.reference is None else self.reference.declarations(),
        )

    def place(self, fresh: Callable[[], Params], weights: Weights) -> tuple[Params, Params | None]:
        """Return the weights to start from, split as the tuning does, with those of the reference."""
        return self.place_policy(fresh, weights, weights.model())

    def place_policy(
        self, fresh: Callable[[], Params], weights: Weights, start: Params | None
    ) -> tuple[Params, Params | None]:
        """Return what `place` does; `start` is the whole model, None where it is drawn."""
        own = None if self.reference is None else self.reference.place(weights)
        trained, frozen = place(self.forward.tuning, fresh, start, weights.adapter(self.forward.tuning))
        return trained, present(policy=frozen, reference=own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledObjective(PolicyObjective):
    """An objective of answers that the policy gave.

    Attributes:
      temperature: answers were sampled at, and log-probabilities are taken at.
    """

    temperature: float

    @property
    def is_measured_in_update(self) -> bool:
        """Whether the one update of a round says itself what the policy that sampled says of the answers."""
        return False

    def policy_params(self, params: Params) -> Params:
        """Return what is trained of the policy."""
        return params

    def policy(self, params: Params, frozen: Params | None) -> tuple[Params, Any]:
        """Return (parameters, adapter) of the policy, to sample with."""
        return self.forward.tuning.join(self.policy_params(params), part(frozen, "policy"))

    def measure(self, rows: Batch, params: Params, moving: Params | None, frozen: Params | None) -> Measured:
        """Return what policy and reference say of sampled answers, before the updates of a round.

        Args:
          moving: the reference that lies in the state, if one does.
        """
        policy, base = self.policy_params(params), part(frozen, "policy")
        options = dict(train=True, temperature=self.temperature)
        ref_logps = None
        if self.reference is not None:
            own = part(frozen, "reference")
            ref_logps = self.reference.token_logps(policy, base, own, rows, temperature=self.temperature)
        elif moving is not None:
            ref_logps = self.forward.token_logps(moving, base, rows, **options)
        logps = None if self.is_measured_in_update else self.forward.token_logps(policy, base, rows, **options)
        return Measured(logps, ref_logps)

    @abc.abstractmethod
    def judge(self, rows: Batch, measured: Measured, judged: Judged) -> RolloutBatch:
        """Return the rows of a round with what their answers teach."""
