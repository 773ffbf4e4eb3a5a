"""From a process's rows to global device arrays, and which lanes a process reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxllm.data.loader import lanes_fit
from jaxllm.data.packing import Row, stack_rows
from jaxllm.errors import InputError
from jaxllm.sharding.processes import gather
from jaxllm.sharding.rules import row_sharding
from jaxllm.types import Batch, PreferenceBatch

Rows = Mapping[str, np.ndarray]
"""One process's rows of a batch: arrays [rows, ...], of which a batch takes those that it has fields for."""

_ROW_FIELDS = frozenset(field.name for field in dataclasses.fields(Batch))
_PAIR_FIELDS = frozenset(field.name for field in dataclasses.fields(PreferenceBatch)) - {"rows"}


@dataclasses.dataclass(frozen=True)
class Feed:
    """Where the rows of global batches go.

    Attributes:
      sharding: of arrays of rows.
      num_lanes: lanes of the run; see `jaxllm.data.loader`.
      lanes: the lanes whose rows this process's devices hold.
    """

    sharding: NamedSharding
    num_lanes: int
    lanes: tuple[int, ...]

    @classmethod
    def create(cls, mesh: Mesh, num_lanes: int, batch_sizes: list[int]) -> Feed:
        """Find this process's lanes.

        Args:
          batch_sizes: all that occur in the run; the mesh must divide them.

        Raises:
          InputError: the lanes do not fit a batch size, or a process's rows are not made of whole lanes.
        """
        sharding = row_sharding(mesh)
        for batch_size in batch_sizes:
            if not lanes_fit(num_lanes, batch_size):
                raise InputError(f"data.num_lanes: {num_lanes} lanes do not divide a batch of {batch_size} rows")
        rows = local_rows(sharding, batch_sizes[0])
        lanes = sorted({lane for row in rows for lane in _lanes_of_row(row, batch_sizes[0], num_lanes)})
        if len(rows) * num_lanes != len(lanes) * batch_sizes[0]:
            raise InputError(
                f"data.num_lanes: with {num_lanes} lanes, process {jax.process_index()} holds parts of lanes; expected "
                f"a multiple of the {batch_sizes[0] // len(rows)} groups of processes that hold different rows"
            )
        return cls(sharding, num_lanes, tuple(lanes))

    def to_devices(self, rows: Rows, batch_size: int) -> Batch | PreferenceBatch:
        """Put this process's rows, in lane order, into a global batch of `batch_size` rows."""
        return self._put(rows, batch_size, _places(self.sharding, batch_size))

    def padding(self, batch_size: int, empty_row: Row) -> Rows:
        """Return rows that stand in for this process's part of a batch that it cannot read."""
        return stack_rows([empty_row] * (len(self.lanes) * batch_size // self.num_lanes))

    def whole_to_devices(self, rows: Rows) -> Batch | PreferenceBatch:
        """Put a batch that every process holds whole onto the devices."""
        batch_size = len(rows["tokens"])
        return self._put(rows, batch_size, {row: row for row in range(batch_size)})

    def _put(self, rows: Rows, batch_size: int, place: Mapping[int, int]) -> Batch | PreferenceBatch:
        def global_array(local: np.ndarray) -> jax.Array:
            def block(index: tuple[slice, ...]) -> np.ndarray:
                first, last, _ = index[0].indices(batch_size)
                start = place[first]
                return local[start : start + last - first, *index[1:]]

            return jax.make_array_from_callback((batch_size, *local.shape[1:]), self.sharding, block)

        def fields(names: frozenset[str]) -> dict[str, jax.Array]:
            return {name: global_array(array) for name, array in rows.items() if name in names}

        batch, pairs = Batch(**fields(_ROW_FIELDS)), fields(_PAIR_FIELDS)
        return PreferenceBatch(rows=batch, **pairs) if pairs else batch


def gather_lane_states(states: Mapping[int, Any]) -> dict[str, Any]:
    """Return the states of all lanes of all processes, by lane number as text (JSON has no other keys)."""
    mine = {str(lane): state for lane, state in states.items()}
    return {lane: state for theirs in gather(mine) for lane, state in theirs.items()}


def _lanes_of_row(row: int, batch_size: int, num_lanes: int) -> range:
    first = row * num_lanes // batch_size
    return range(first, max((row + 1) * num_lanes // batch_size, first + 1))


@functools.lru_cache(maxsize=16)
def _places(sharding: NamedSharding, batch_size: int) -> Mapping[int, int]:
    """Return where each row of this process lies among its own; asked for at every step."""
    return {row: place for place, row in enumerate(local_rows(sharding, batch_size))}


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """Return the rows of a global batch that this process's devices hold, in order."""
    blocks = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    return sorted({row for block in blocks for row in range(*block[0].indices(batch_size))})
