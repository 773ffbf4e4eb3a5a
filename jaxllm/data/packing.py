"""Documents to rows of a fixed length, without losing a prediction.

A document of n tokens x is n + 1 (input, target) pairs: the inputs are [start, *x], the targets [*x, eos]. Rows are
filled pair after pair, and a document cut at the end of a row goes on in the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from jaxllm.data.shards import ShardSet
from jaxllm.errors import InputError

Packing = Literal["packed", "concat"]
Row = dict[str, np.ndarray]
"""Arrays of one row [T], or of a batch of rows [B, T]; see `RowIterator`."""


class Piece(NamedTuple):
    """Consecutive pairs of one document: inputs are tokens[:-1], targets tokens[1:] (int32 [pairs + 1])."""

    document: int
    tokens: np.ndarray


class Pieces:
    """The documents of a shard set as pieces, by number and in order.

    Documents longer than `max_pairs` are cut into several pieces, which are shuffled and dealt to the lanes like
    documents of their own: otherwise every lane would read the same text when a corpus is one large file.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        start_id: int,
        eos_id: int,
        max_pairs: int | None = None,
        first_document: int = 0,
    ):
        """Index the pieces.

        Args:
          max_pairs: longest piece, in pairs; None: documents stay whole.
          first_document: number that the pieces give the first document.
        """
        self._shards = shards
        self._start, self._eos = np.array([[start_id], [eos_id]], np.int32)
        self._max_pairs = max_pairs or shards.num_tokens + 1
        self._first_document = first_document
        extra = shards.lengths() // self._max_pairs
        # Only documents of several pieces are remembered: their numbers, first pieces, and further pieces.
        self._long = np.flatnonzero(extra)
        self._extra = extra[self._long]
        self._first_piece = self._long + np.cumsum(self._extra) - self._extra
        self._length = len(shards) + int(self._extra.sum())

    def __len__(self) -> int:
        return self._length

    @property
    def num_pairs(self) -> int:
        """Pairs in all pieces together."""
        return self._shards.num_tokens + len(self._shards)

    def __getitem__(self, index: int) -> Piece:
        document, piece = self._locate(index)
        ids = self._shards.tokens(document)
        begin = piece * self._max_pairs
        end = min(begin + self._max_pairs, len(ids) + 1)
        body = ids[max(begin - 1, 0) : end].astype(np.int32)
        if body.size and body.max() >= self._shards.index.vocab_size:
            raise InputError(
                f"{self._shards.folder}: damaged: token id {body.max()} in document {document} "
                f"({self._shards.origin(document)}), but the vocabulary has {self._shards.index.vocab_size}"
            )
        head = [self._start] if begin == 0 else []
        tail = [self._eos] if end == len(ids) + 1 else []
        return Piece(self._first_document + document, np.concatenate([*head, body, *tail]))

    def _locate(self, index: int) -> tuple[int, int]:
        """Return (document, which of its pieces)."""
        nearest = int(np.searchsorted(self._first_piece, index, side="right")) - 1
        if nearest < 0:
            return index, 0
        piece = index - int(self._first_piece[nearest])
        beyond = piece - int(self._extra[nearest])
        document = int(self._long[nearest])
        return (document, piece) if beyond <= 0 else (document + beyond, 0)


class RowIterator(grain.DatasetIterator):
    """Lay pieces one after the other into rows of exactly T pairs.

    Rows are dicts: tokens, targets, positions and segment_ids int32 [T], loss_weights float32 [T], document_ids int64
    [T]. "packed" numbers the segments of a row 1, 2, ... and restarts the positions in each; "concat" makes a row one
    segment. What the last row of finite data leaves free is padding: segment 0, weight 0, document -1.

    The state is the number of the current piece and the pairs of it already used, so that saving and restoring cost
    the same anywhere in a run.
    """

    def __init__(self, pieces: grain.MapDataset[Piece] | Pieces, seq_len: int, packing: Packing):
        super().__init__()
        self._pieces = pieces
        self._num_pieces = len(pieces)
        self._seq_len = seq_len
        self._packing = packing
        self._range = np.arange(seq_len, dtype=np.int32)
        self._piece: Piece | None = None
        self._index = 0
        self._offset = 0

    def __next__(self) -> Row:
        row = empty_row(self._seq_len)
        filled = segment = 0
        while filled < self._seq_len and self._index < self._num_pieces:
            document, tokens = self._take(self._seq_len - filled)
            segment += 1
            count = len(tokens) - 1
            span = slice(filled, filled + count)
            row["tokens"][span] = tokens[:-1]
            row["targets"][span] = tokens[1:]
            row["segment_ids"][span] = segment
            row["positions"][span] = self._range[:count]
            row["document_ids"][span] = document
            filled += count
        if not filled:
            raise StopIteration
        row["loss_weights"][:filled] = 1
        if self._packing == "concat":
            row["segment_ids"][:filled] = 1
            row["positions"][:filled] = self._range[:filled]
        return row

    def get_state(self) -> dict[str, Any]:
        return {"piece": self._index, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._index, self._offset = state["piece"], state["offset"]
        self._piece = None

    def _take(self, most: int) -> Piece:
        """Return the next pairs of the current piece, at most `most`, and move on."""
        if self._piece is None:
            self._piece = self._pieces[self._index]
        document, tokens = self._piece
        begin = self._offset
        self._offset = min(begin + most, len(tokens) - 1)
        taken = Piece(document, tokens[begin : self._offset + 1])
        if self._offset == len(tokens) - 1:
            self._piece, self._index, self._offset = None, self._index + 1, 0
        return taken


def empty_row(seq_len: int) -> Row:
    """Return a row of padding."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    row["loss_weights"] = np.zeros(seq_len, np.float32)
    row["document_ids"] = np.full(seq_len, -1, np.int64)
    return row


def stack_rows(rows: Sequence[Row]) -> Row:
    """Turn B rows into one batch of arrays [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
