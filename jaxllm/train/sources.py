"""Where the batches of a run come from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxllm.data.loader import Prefetcher, TrainLoader
from jaxllm.errors import InputError
from jaxllm.train.feed import gather_lane_states
from jaxllm.train.setup import Setup
from jaxllm.train.signals import Votes
from jaxllm.types import Params, TrainState


class Fed(NamedTuple):
    """The batch of one step.

    Attributes:
      state: that the step is to take; a source may change it (a reference that moves).
      batch: on the devices.
      document_ids: of this process's rows, for messages.
      metrics: what the source has to record of it.
    """

    state: TrainState
    batch: Any
    document_ids: np.ndarray
    metrics: dict[str, float]


class BatchSource(Protocol):
    """Batches, step after step; a run is saved and stopped only where nothing of a batch is left over."""

    def restore(self, position: dict[str, Any]) -> None:
        """Continue where `position` was taken."""

    def running(self, step: int, votes: Votes) -> contextlib.AbstractContextManager[None]:
        """Return the context in which batches are given, from that of `step` on."""

    def next(self, state: TrainState, frozen: Params | None, step: int) -> Fed | None:
        """Return the batch of `step`; None where a signal came while it was being made.

        Raises:
          InputError: bad data; where a run has several processes, it is told to the votes and padding is returned.
        """

    def may_stop(self, step: int) -> bool:
        """Tell whether the run can be saved before `step`, so that it continues exactly."""

    def position(self) -> dict[str, Any]:
        """Return where the source stands, as JSON values, the same in all processes."""

    def describe(self, document_ids: np.ndarray) -> list[str]:
        """Name rows of this process's batches, each once, as "file:line"."""


@dataclasses.dataclass
class LoaderSource:
    """Batches of rows that are read, not made."""

    setup: Setup
    loader: TrainLoader

    def restore(self, position: dict[str, Any]) -> None:
        """Continue where `position` was taken."""
        self.loader.restore({int(lane): where for lane, where in position["lanes"].items()})

    @contextlib.contextmanager
    def running(self, step: int, votes: Votes) -> Iterator[None]:
        """Read ahead in the background."""
        self._votes = votes
        sizes, depth = self.setup.batch_sizes, self.setup.config.data.prefetch
        with Prefetcher(self.loader, sizes.at, start_step=step, depth=depth) as self._batches:
            yield

    def next(self, state: TrainState, frozen: Params | None, step: int) -> Fed:
        """Return the next rows."""
        del frozen
        size = self.setup.batch_sizes.at(step)
        try:
            rows = self._batches.next_batch()
        except InputError as error:
            self._votes.fail(error)
            rows = self.setup.feed.padding(size, self.setup.empty_row)
        return Fed(state, self.setup.feed.to_devices(rows, size), rows["document_ids"], {})

    def may_stop(self, step: int) -> bool:
        """Return True: between any two batches nothing is left over."""
        del step
        return True

    def position(self) -> dict[str, Any]:
        """Return the positions of all lanes."""
        return {"num_lanes": self.setup.feed.num_lanes, "lanes": gather_lane_states(self._batches.state())}

    def describe(self, document_ids: np.ndarray) -> list[str]:
        """Name the documents of rows."""
        return self.loader.describe(document_ids)
