"""How the pieces of several sources are dealt to lanes, each source with its share."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Sequence

import grain

from jaxllm.data.example_rows import Items
from jaxllm.data.packing import Pieces
from jaxllm.errors import InputError

Numbered = Pieces | Items
"""The pieces of one source, by number."""

_SHARE_SCALE = 2**40


def lane_pieces(
    sources: Sequence[Numbered], shares: Sequence[int], *, lane: int, num_lanes: int, seed: int | None
) -> grain.MapDataset:
    """Return the endless pieces of one lane, by number: nothing is stored, not even the shuffled order."""
    datasets = []
    for number, pieces in enumerate(sources):
        dataset = grain.MapDataset.source(pieces)
        if seed is not None:
            # grain adds the epoch to the seed: seeds of sources must lie far apart.
            dataset = dataset.shuffle(seed=zlib.crc32(f"{seed} {number}".encode()))
        datasets.append(dataset.repeat().slice(slice(lane, None, num_lanes)))
    return grain.MapDataset.select_from_datasets(datasets, _Mixture(shares, lane, num_lanes))


class _Mixture(grain.transforms.DatasetSelectionMap):
    """Interleave sources so that after any k pieces each has given its share of k, to within a few pieces.

    grain's own mix rounds weights to 1 %, and would bring a rare source up in all lanes at once: here the lanes'
    phases are spread.
    """

    def __init__(self, shares: Sequence[int], lane: int, num_lanes: int):
        self._shares = tuple(shares)
        self._lane = lane
        self._num_lanes = num_lanes

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (source, how many of its pieces came before) of the piece number `index`."""
        remaining = sum(self._shares)
        for source, share in enumerate(self._shares):
            phase = remaining * self._lane // self._num_lanes
            taken, progress = divmod(index * share + phase, remaining)
            if progress + share >= remaining:
                return source, taken
            index -= taken
            remaining -= share
        raise AssertionError("the last source takes what the others leave")


def piece_shares(sources: Sequence[Numbered], weights: Sequence[float | None] | None) -> list[int]:
    """Turn shares of the tokens into shares of the pieces."""
    sizes = [pieces.num_pairs for pieces in sources]
    weights = sizes if weights is None or all(weight is None for weight in weights) else weights
    for number, weight in enumerate(weights):
        if weight is None:
            raise InputError(f"data.train[{number}].weight: missing; expected a weight for every source or for none")
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"data.train[{number}].weight: found {weight}, expected a number above 0")
    rates = [weight * len(pieces) / size for weight, pieces, size in zip(weights, sources, sizes, strict=True)]
    return [max(1, round(rate / max(rates) * _SHARE_SCALE)) for rate in rates]
