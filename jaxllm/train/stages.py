"""What differs between stages outside of their objectives: the data they read, and how they are evaluated."""

from __future__ import annotations

from collections.abc import Callable

from jaxllm.config.stages import POLICY_STAGES
from jaxllm.train.evaluate import HeldoutLoss
from jaxllm.train.precomputed import with_logps
from jaxllm.train.rollouts.heldout_reward import HeldoutReward
from jaxllm.train.rollouts.setup import make_rollouts
from jaxllm.train.rollouts.source import RolloutSource
from jaxllm.train.setup import Opened, Setup, make_loader
from jaxllm.train.signals import Votes
from jaxllm.train.sources import BatchSource, LoaderSource
from jaxllm.train.weights import RunWeights
from jaxllm.types import Params, TrainState

Evaluator = Callable[[TrainState, Params | None, Votes], dict[str, float] | None]
"""Returns the metrics on what is held out, None if a signal cut it short."""


def make_source(setup: Setup, opened: Opened, weights: RunWeights) -> BatchSource:
    """Build where the run's batches come from, at the beginning.

    Raises:
      InputError: bad data, or weights of other models that the stage needs.
    """
    if setup.config.stage in POLICY_STAGES:
        return make_rollouts(setup, opened, weights)
    if opened.reference is not None:
        setup = with_logps(setup, opened.reference.training)
    return LoaderSource(setup, make_loader(setup, opened.training))


def make_evaluator(setup: Setup, opened: Opened, source: BatchSource) -> Evaluator | None:
    """Build the held-out evaluation; None where nothing is held out."""
    if not opened.heldout:
        return None
    if isinstance(source, RolloutSource):
        return HeldoutReward(setup, opened.heldout, source.respondent)
    if opened.reference is not None:
        setup = with_logps(setup, opened.reference.heldout)
    return HeldoutLoss(setup, opened.heldout)
