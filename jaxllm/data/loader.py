"""Batches for training and evaluation, read in lanes.

A lane is an endless stream of rows with its own part of the documents, its own mixture and its own packer. Row r of a
global batch of B rows comes from lane r * num_lanes // B or, where a batch has fewer rows than there are lanes, in turn
from one of the num_lanes / B lanes from there on. So a process reads only the lanes of its rows, and neither the number
of processes nor a changing batch size changes any lane: the position in the data is that of the lanes.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from jaxllm.data.blank_rows import BlankInfilling, BlankRowIterator
from jaxllm.data.example_rows import ExampleRowIterator, ExampleRows, Items
from jaxllm.data.example_set import ExampleSet
from jaxllm.data.mixture import lane_pieces, piece_shares
from jaxllm.data.packing import Packing, Pieces, Row, RowIterator, empty_row, stack_rows
from jaxllm.data.rows import Prompt
from jaxllm.data.shards import ShardSet
from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer

MAX_LANES = 64
# A long document is read as several pieces: at least so many for each lane (as far as pieces of whole rows allow), so
# that lanes read different text even when the corpus is one file; and of at most so many rows: cuts cost context.
_PIECES_PER_LANE = 8
_ROWS_PER_PIECE = 16

RowRule = Packing | BlankInfilling | ExampleRows
"""How documents or examples become rows."""

Source = ShardSet | ExampleSet
"""What is read: documents, or with `ExampleRows` examples. Both are numbered through all sources of a loader."""

LaneState = dict[str, Any]
"""Position of one lane, JSON types only: the state of its rows (see `RowIterator`, `BlankRowIterator` and
`ExampleRowIterator`), in "stream" what the lane reads, and in "batches" how many were read."""


def default_num_lanes(batch_sizes: Iterable[int]) -> int:
    """Return 64 if every batch size of a run divides it or is a multiple of it, else the largest divisor of all."""
    sizes = list(batch_sizes)
    return MAX_LANES if all(lanes_fit(MAX_LANES, size) for size in sizes) else math.gcd(MAX_LANES, *sizes)


def lanes_fit(num_lanes: int, batch_size: int) -> bool:
    """Tell whether each row takes from whole lanes, or each lane gives whole rows."""
    return batch_size > 0 and (batch_size % num_lanes == 0 or num_lanes % batch_size == 0)


def boundary_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return (start id, eos id): what opens and what closes a document; eos opens where there is no bos."""
    if tokenizer.eos_id is None:
        raise InputError("tokenizer: has no end-of-text token (eos_token); documents cannot be told apart without one")
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return start, tokenizer.eos_id


def padding_row(seq_len: int, packing: RowRule) -> Row:
    """Return a row of padding that has the fields of the others."""
    return empty_row(seq_len) if isinstance(packing, str) else packing.empty_row(seq_len)


class TrainLoader:
    """Endless batches from weighted sources, for the lanes of one process.

    A batch is a dict of arrays [rows, T] (see `RowIterator`, `BlankRowIterator` and `ExampleRows`) with the process's
    rows in the order of `lanes`. In each epoch of a source every document is seen once, in a new seeded order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float | None] | None = None,
        *,
        seq_len: int,
        packing: RowRule,
        num_lanes: int,
        seed: int,
        shuffle: bool = True,
        start_id: int | None = None,
        eos_id: int | None = None,
        lanes: Sequence[int] | None = None,
    ):
        """Open the lanes at the beginning.

        Args:
          sources: token shards, or example sets.
          weights: share of the tokens (of prompts: of their number) that comes from each source, in any unit; None for
            all of them: their sizes.
          seq_len: T, tokens in a row.
          num_lanes: lanes of the whole run.
          start_id, eos_id: what opens and closes a document of token shards; see `boundary_ids`.
          lanes: the lanes that this process reads; None: all.

        Raises:
          InputError: there is no source, or the weights make no sense.
        """
        if not sources:
            raise InputError("data.train: no sources; expected at least one")
        self.num_lanes = num_lanes
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))
        pieces = _numbered_pieces(sources, packing, seq_len, start_id, eos_id, num_lanes)
        shares = piece_shares(pieces, weights)
        self._batches = 0
        self._stream = {
            "num_lanes": num_lanes,
            "seq_len": seq_len,
            "packing": packing if isinstance(packing, str) else packing.describe(),
            "shuffle": shuffle,
            "seed": seed,
            "start_id": start_id,
            "eos_id": eos_id,
            "sources": [source.size() | {"share": share} for source, share in zip(sources, shares, strict=True)],
        }
        self._lanes = {
            lane: _open_rows(
                lane_pieces(pieces, shares, lane=lane, num_lanes=num_lanes, seed=seed if shuffle else None),
                seq_len,
                packing,
                blank_seed=(seed, lane),
                equal_rows=True,
            )
            for lane in (range(num_lanes) if lanes is None else lanes)
        }

    def next_batch(self, batch_size: int) -> Row:
        """Return this process's rows of the next global batch of `batch_size` rows, which may change between calls.

        Raises InputError when neither of the batch size and num_lanes is a multiple of the other.
        """
        if not lanes_fit(self.num_lanes, batch_size):
            raise InputError(f"data.num_lanes: {self.num_lanes} lanes do not divide a batch of {batch_size} rows")
        lanes_per_row = max(self.num_lanes // batch_size, 1)
        turn = self._batches % lanes_per_row
        rows_per_lane = max(batch_size // self.num_lanes, 1)
        lanes = list(self._lanes.values())[turn::lanes_per_row]
        self._batches += 1
        return stack_rows([next(rows) for rows in lanes for _ in range(rows_per_lane)])

    def state(self) -> dict[int, LaneState]:
        """Return the position of each lane of this process, after the batches returned so far."""
        shared = {"batches": self._batches, "stream": self._stream}
        return {lane: rows.get_state() | shared for lane, rows in self._lanes.items()}

    def restore(self, states: Mapping[int, LaneState]) -> None:
        """Continue where `state` was taken, on whichever process that was; other lanes' states are ignored.

        Raises InputError when a lane is missing or the data or how it is read changed.
        """
        for lane, rows in self._lanes.items():
            if lane not in states:
                raise InputError(f"data position: lane {lane} is missing; found the lanes {sorted(states)}")
            _refuse_changes(states[lane]["stream"], self._stream)
            rows.set_state(states[lane])
            self._batches = states[lane]["batches"]

    def describe(self, document_ids: np.ndarray) -> list[str]:
        """Name the documents in (part of) a batch's document_ids, each once, as "file:line"."""
        origins = []
        for document in np.unique(document_ids[document_ids >= 0]).tolist():
            source, number = self._locate(document)
            origins.append(source.origin(number))
        return origins

    def prompt(self, document: int) -> Prompt:
        """Return the prompt with this number in a batch's document_ids."""
        source, number = self._locate(document)
        return source.prompt(number)

    def _locate(self, document: int) -> tuple[Source, int]:
        """Return (source, number within it)."""
        number = bisect.bisect_right(self._ends, document)
        source = self._sources[number]
        return source, document - self._ends[number] + len(source)


class Prefetcher:
    """Prepare batches ahead in one background thread; a context manager.

    The state it gives is that after the last batch it returned: what is prepared ahead does not count.
    """

    def __init__(
        self, loader: TrainLoader, batch_size_at: Callable[[int], int], *, start_step: int = 0, depth: int = 2
    ):
        """Start with the batch of `start_step`.

        Args:
          loader: used by this object alone from now on, but for `describe`.
          batch_size_at: global rows of the batch of a step.
          depth: batches prepared ahead, at least 1.
        """
        if depth < 1:
            raise InputError(f"data.prefetch: found {depth}, expected at least 1")
        self._loader = loader
        self._state = loader.state()
        self._batch_size_at = batch_size_at
        self._steps = itertools.count(start_step)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending = collections.deque(self._submit() for _ in range(depth))

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def next_batch(self) -> Row:
        """Return the next step's batch; raises what its preparation raised, again at each call."""
        batch, self._state = self._pending[0].result()
        self._pending.popleft()
        self._pending.append(self._submit())
        return batch

    def state(self) -> dict[int, LaneState]:
        """Return the position of each lane after the last batch returned by `next_batch`."""
        return self._state

    def close(self) -> None:
        """Stop the thread, after the batch it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self) -> Future[tuple[Row, dict[int, LaneState]]]:
        return self._thread.submit(self._prepare, next(self._steps))

    def _prepare(self, step: int) -> tuple[Row, dict[int, LaneState]]:
        return self._loader.next_batch(self._batch_size_at(step)), self._loader.state()


def heldout_batches(
    sources: Sequence[Source],
    *,
    seq_len: int,
    packing: RowRule,
    batch_size: int,
    start_id: int | None = None,
    eos_id: int | None = None,
) -> Iterator[Row]:
    """Yield each document or example once and in order, as batches of `batch_size` rows.

    The last batch is filled up with rows of padding. Blanks are always the same.
    """
    numbered = _numbered_pieces(sources, packing, seq_len, start_id, eos_id)
    pieces = grain.MapDataset.concatenate([grain.MapDataset.source(pieces) for pieces in numbered])
    filled = _open_rows(pieces, seq_len, packing, blank_seed=(0,), equal_rows=False)
    while batch := list(itertools.islice(filled, batch_size)):
        batch += [padding_row(seq_len, packing)] * (batch_size - len(batch))
        yield stack_rows(batch)


def _open_rows(
    pieces: grain.MapDataset[Any],
    seq_len: int,
    packing: RowRule,
    *,
    blank_seed: Sequence[int],
    equal_rows: bool,
) -> RowIterator | BlankRowIterator | ExampleRowIterator:
    if isinstance(packing, ExampleRows):
        return ExampleRowIterator(pieces, seq_len, packing)
    if not isinstance(packing, BlankInfilling):
        return RowIterator(pieces, seq_len, packing)
    equal_rows = equal_rows and packing.options.equal_rows
    return BlankRowIterator(pieces, seq_len, packing, seed=blank_seed, equal_rows=equal_rows)


def _numbered_pieces(
    sources: Sequence[Source],
    packing: RowRule,
    seq_len: int,
    start_id: int | None,
    eos_id: int | None,
    num_lanes: int | None = None,
) -> list[Pieces | Items]:
    """Index the pieces of several sources, with documents numbered through all of them; for lanes they are short."""
    firsts = itertools.accumulate(map(len, sources[:-1]), initial=0)
    if isinstance(packing, ExampleRows):
        return [packing.items(source, seq_len, first) for source, first in zip(sources, firsts, strict=True)]
    return [
        Pieces(
            shards,
            start_id=start_id,
            eos_id=eos_id,
            max_pairs=None if num_lanes is None else _longest_piece(shards, seq_len, num_lanes),
            first_document=first,
        )
        for shards, first in zip(sources, firsts, strict=True)
    ]


def _longest_piece(shards: ShardSet, seq_len: int, num_lanes: int) -> int:
    rows = (shards.num_tokens + len(shards)) // seq_len
    return seq_len * min(max(rows // (num_lanes * _PIECES_PER_LANE), 1), _ROWS_PER_PIECE)


def _refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changes = [f"{name} changed from {saved.get(name)} to {now[name]}" for name in now if saved.get(name) != now[name]]
    if changes:
        raise InputError(f"data position: cannot be restored, because {'; '.join(changes)}")
