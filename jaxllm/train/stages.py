"""What differs between stages outside of their objectives: the data they read, and how they are evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxllm.data.shards import Progress, ShardSet
from jaxllm.train.evaluate import HeldoutLoss
from jaxllm.train.setup import Setup, make_loader, open_sources
from jaxllm.train.signals import Votes
from jaxllm.train.sources import BatchSource, LoaderSource
from jaxllm.train.weights import RunWeights
from jaxllm.types import Params, TrainState

Evaluator = Callable[[TrainState, Params | None, Votes], dict[str, float] | None]
"""Returns the metrics on what is held out, None if a signal cut it short."""


class Opened(NamedTuple):
    """The sources of a run."""

    training: list[ShardSet]
    heldout: list[ShardSet]


def open_data(
    setup: Setup,
    cache_dir: Path,
    *,
    note: Callable[[str], None],
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> Opened:
    """Open all sources of a run, see `setup.open_sources`."""
    return Opened(*open_sources(setup, cache_dir, note=note, progress=progress, scratch=scratch))


def make_source(setup: Setup, opened: Opened, weights: RunWeights) -> BatchSource:
    """Build where the run's batches come from, at the beginning.

    Raises:
      InputError: bad data, or weights of other models that the stage needs.
    """
    del weights
    return LoaderSource(setup, make_loader(setup, opened.training))


def make_evaluator(setup: Setup, opened: Opened, source: BatchSource) -> Evaluator | None:
    """Build the held-out evaluation; None where nothing is held out."""
    del source
    return HeldoutLoss(setup, opened.heldout) if opened.heldout else None
