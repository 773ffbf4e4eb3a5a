"""No (input, target) pair is lost, doubled or moved, wherever rows and pieces are cut."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.packing import Pieces, RowIterator, stack_rows
from jaxllm.errors import InputError

START, EOS = 900, 901

DOCUMENTS = st.lists(st.lists(st.integers(0, 899), max_size=40), min_size=1, max_size=12)
SEQ_LEN = st.integers(1, 16)
MAX_PAIRS = st.none() | st.integers(1, 20)
PACKING = st.sampled_from(["packed", "concat"])


def pack(pieces, seq_len, packing):
    return stack_rows(list(RowIterator(pieces, seq_len, packing)))


def pairs_of(documents, start=START):
    """(input, target, document, position in the document) of all pairs, in order."""
    return [
        (token, target, number, position)
        for number, ids in enumerate(documents)
        for position, (token, target) in enumerate(zip([start, *ids], [*ids, EOS], strict=True))
    ]


@settings(deadline=None)
@given(DOCUMENTS, SEQ_LEN, MAX_PAIRS, PACKING)
def test_every_pair_appears_once_and_in_order(shards_of, documents, seq_len, max_pairs, packing):
    pieces = Pieces(shards_of(documents), start_id=START, eos_id=EOS, max_pairs=max_pairs)
    rows = pack(pieces, seq_len, packing)
    found = zip(*(rows[name].ravel().tolist() for name in ("tokens", "targets", "document_ids")), strict=True)
    expected = [pair[:3] for pair in pairs_of(documents)]
    padding = rows["tokens"].size - len(expected)
    assert list(found) == expected + [(0, 0, -1)] * padding
    assert padding < seq_len
    assert rows["loss_weights"].ravel().tolist() == [1.0] * len(expected) + [0.0] * padding
    assert pieces.num_pairs == len(expected)


@settings(deadline=None)
@given(DOCUMENTS, SEQ_LEN, MAX_PAIRS)
def test_packed_segments_are_the_pieces_of_a_row(shards_of, documents, seq_len, max_pairs):
    rows = pack(Pieces(shards_of(documents), start_id=START, eos_id=EOS, max_pairs=max_pairs), seq_len, "packed")
    pairs = pairs_of(documents)
    segment = position = 0
    for slot, (_, _, _, in_document) in enumerate(pairs):
        row, column = divmod(slot, seq_len)
        begins = in_document % max_pairs == 0 if max_pairs else in_document == 0
        segment = 1 if column == 0 else segment + begins
        position = 0 if column == 0 or begins else position + 1
        assert (rows["segment_ids"][row, column], rows["positions"][row, column]) == (segment, position)
    assert not rows["segment_ids"].ravel()[len(pairs) :].any()
    assert not rows["positions"].ravel()[len(pairs) :].any()


@settings(deadline=None)
@given(DOCUMENTS, SEQ_LEN)
def test_concat_is_the_eos_separated_text(shards_of, documents, seq_len):
    rows = pack(Pieces(shards_of(documents), start_id=EOS, eos_id=EOS), seq_len, "concat")
    stream = [EOS, *itertools.chain(*([*ids, EOS] for ids in documents))]
    real = len(stream) - 1
    assert rows["tokens"].ravel()[:real].tolist() == stream[:-1]
    assert rows["targets"].ravel()[:real].tolist() == stream[1:]
    assert rows["segment_ids"].ravel().tolist() == [1] * real + [0] * (rows["tokens"].size - real)
    assert rows["positions"].ravel()[:real].tolist() == [slot % seq_len for slot in range(real)]


@settings(deadline=None)
@given(DOCUMENTS, SEQ_LEN, MAX_PAIRS, PACKING, st.data())
def test_a_saved_position_goes_on_with_the_very_next_row(shards_of, documents, seq_len, max_pairs, packing, data):
    pieces = Pieces(shards_of(documents), start_id=START, eos_id=EOS, max_pairs=max_pairs)
    rows = list(RowIterator(pieces, seq_len, packing))
    done = data.draw(st.integers(0, len(rows)))
    iterator = RowIterator(pieces, seq_len, packing)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    restored = RowIterator(pieces, seq_len, packing)
    next(restored)
    restored.set_state(state)
    rest = list(restored)
    assert len(rest) == len(rows) - done
    for row, expected in zip(rest, rows[done:], strict=True):
        assert all(np.array_equal(row[name], expected[name]) for name in expected)


class CountedPieces(Pieces):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_restoring_far_into_the_data_reads_one_piece(shards_of):
    pieces = CountedPieces(shards_of([[1] * 9] * 1000), start_id=START, eos_id=EOS)
    iterator = RowIterator(pieces, 7, "packed")
    for _ in range(1400):
        next(iterator)
    restored = RowIterator(pieces, 7, "packed")
    pieces.reads = 0
    restored.set_state(iterator.get_state())
    next(restored)
    assert pieces.reads <= 2


def test_shapes_and_types(shards_of):
    rows = pack(Pieces(shards_of([[1, 2, 3]] * 5), start_id=START, eos_id=EOS), 6, "packed")
    kinds = {name: (array.dtype.name, array.shape) for name, array in rows.items()}
    int32, int64, float32 = (("int32", (4, 6)), ("int64", (4, 6)), ("float32", (4, 6)))
    assert kinds == {
        "tokens": int32,
        "targets": int32,
        "positions": int32,
        "segment_ids": int32,
        "loss_weights": float32,
        "document_ids": int64,
    }


def test_ids_outside_the_vocabulary_are_refused_by_document(shards_of):
    pieces = Pieces(shards_of([[1, 2], [3, 1000]]), start_id=START, eos_id=EOS)
    assert pieces[0].tokens.tolist() == [START, 1, 2, EOS]
    with pytest.raises(
        InputError, match=r"token id 1000 in document 1 \(memory\.jsonl:2\), but the vocabulary has 1000"
    ):
        pieces[1]
