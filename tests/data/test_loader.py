"""Lanes: the same batches whoever reads them, wherever reading is broken off and however the batch size changes."""

import collections
import json
import threading
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.loader import (
    Prefetcher,
    TrainLoader,
    boundary_ids,
    default_num_lanes,
    heldout_batches,
)
from jaxllm.errors import InputError

START, EOS = 900, 901
NUM_LANES = 8


def corpus(shards_of, num_documents, longest, name="memory", seed=0):
    rng = np.random.default_rng(seed)
    return shards_of([rng.integers(0, 900, rng.integers(1, longest)) for _ in range(num_documents)], name)


@pytest.fixture(scope="module")
def sources(shards_of):
    return [corpus(shards_of, 60, 20, "a"), corpus(shards_of, 20, 90, "b", seed=1)]


def open_loader(sources, weights=None, **options):
    defaults = {"seq_len": 16, "packing": "packed", "num_lanes": NUM_LANES, "seed": 3, "start_id": START, "eos_id": EOS}
    return TrainLoader(sources, weights, **{**defaults, **options})


def open_readers(sources, num_readers, states=None):
    size = NUM_LANES // num_readers
    readers = [open_loader(sources, lanes=range(r * size, (r + 1) * size)) for r in range(num_readers)]
    for reader in readers if states else ():
        reader.restore(states)
    return readers


def read(readers, batch_size):
    parts = [reader.next_batch(batch_size) for reader in readers]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


def documents_in_order(loader, num_batches):
    """Documents begun, in the order of the stream of a loader of one lane."""
    begun = []
    for _ in range(num_batches):
        batch = loader.next_batch(NUM_LANES)
        begun += batch["document_ids"][batch["tokens"] == START].tolist()
    return begun


PHASES = st.lists(
    st.tuples(st.sampled_from([1, 2, 4]), st.lists(st.sampled_from([4, 8, 16, 24]), min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15, deadline=None)
@given(PHASES)
def test_batches_do_not_depend_on_who_reads_or_where_reading_breaks_off(sources, phases):
    alone, states = open_readers(sources, 1), None
    for num_readers, batch_sizes in phases:
        readers = open_readers(sources, num_readers, states)
        for batch_size in batch_sizes:
            assert_equal(read(readers, batch_size), read(alone, batch_size))
        saved = {lane: state for reader in readers for lane, state in reader.state().items()}
        states = {int(lane): state for lane, state in json.loads(json.dumps(saved)).items()}
        assert states == alone[0].state()


@pytest.mark.parametrize("batch_size", [8, 24])
def test_row_r_comes_from_lane_r_times_lanes_over_rows(sources, batch_size):
    batch = open_loader(sources).next_batch(batch_size)
    for row in range(batch_size):
        lane = row * NUM_LANES // batch_size
        block = open_loader(sources, lanes=[lane]).next_batch(batch_size)
        first = lane * batch_size // NUM_LANES
        assert_equal({name: array[row - first] for name, array in block.items()}, {n: a[row] for n, a in batch.items()})


def test_small_batches_take_turns_among_the_lanes(sources):
    small, whole = open_loader(sources), open_loader(sources).next_batch(NUM_LANES)["tokens"]
    pairs = [small.next_batch(2)["tokens"] for _ in range(NUM_LANES // 2)]
    assert (np.stack(pairs, axis=1).reshape(whole.shape) == whole).all()


def test_each_epoch_has_every_document_once_in_a_new_order(shards_of):
    loader = open_loader([corpus(shards_of, 20, 10)], num_lanes=1)
    order = documents_in_order(loader, 8)
    epochs = [order[begin : begin + 20] for begin in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(20)]}) == 4
    again = documents_in_order(open_loader([corpus(shards_of, 20, 10)], num_lanes=1), 8)
    other = documents_in_order(open_loader([corpus(shards_of, 20, 10)], num_lanes=1, seed=4), 8)
    assert again == order != other


def test_lanes_share_out_the_documents_of_an_epoch(shards_of):
    source = corpus(shards_of, 20, 10)
    lanes = [documents_in_order(open_loader([source], lanes=[lane]), 8) for lane in range(NUM_LANES)]
    dealt = [lane[turn] for turn in range(5) for lane in lanes]
    assert sorted(dealt[:20]) == sorted(dealt[20:40]) == list(range(20))


def test_without_shuffling_documents_come_in_order(shards_of):
    order = documents_in_order(open_loader([corpus(shards_of, 20, 10)], num_lanes=1, shuffle=False), 8)
    assert order[:40] == [*range(20), *range(20)]


def test_one_long_document_is_shared_out_over_the_lanes(shards_of):
    loader = open_loader([shards_of([np.arange(NUM_LANES * 8 * 16 - 1)], vocab_size=2000)])
    seen = collections.Counter()
    for _ in range(8):
        batch = loader.next_batch(NUM_LANES)
        assert len({tuple(row) for row in batch["targets"].tolist()}) == NUM_LANES
        seen.update(batch["targets"].ravel().tolist())
    assert set(seen) == {*range(NUM_LANES * 8 * 16 - 1), EOS} and set(seen.values()) <= {1, 2}


def count_by_source(loader, num_batches, first_of_second):
    tokens, documents = np.zeros(2), np.zeros(2)
    for _ in range(num_batches):
        batch = loader.next_batch(NUM_LANES)
        second = batch["document_ids"] >= first_of_second
        tokens += (~second).sum(), second.sum()
        begun = batch["tokens"] == START
        documents += (begun & ~second).sum(), (begun & second).sum()
    return tokens / tokens.sum(), documents


def test_weights_are_shares_of_the_tokens(shards_of):
    sources = [corpus(shards_of, 900, 30), corpus(shards_of, 300, 90, seed=1)]
    tokens, _ = count_by_source(open_loader(sources, [6.0, 4.0], seq_len=128), 100, 900)
    np.testing.assert_allclose(tokens, [0.6, 0.4], atol=0.01)


def test_by_default_sources_end_their_epochs_together(shards_of):
    sources = [corpus(shards_of, 900, 30), corpus(shards_of, 300, 90, seed=1)]
    _, documents = count_by_source(open_loader(sources), 300, 900)
    assert abs(documents[0] - 3 * documents[1]) <= 4 * NUM_LANES
    # A rare source comes up at another time in each lane.
    rare = open_loader([sources[0], corpus(shards_of, 1, 2)], seq_len=900)
    assert 0 < (rare.next_batch(NUM_LANES)["document_ids"] == 900).any(axis=1).sum() < NUM_LANES


def test_documents_are_named_by_file_and_line(sources):
    loader = open_loader(sources)
    assert loader.describe(np.array([[60, 0], [-1, 60], [79, 59]])) == [
        "a.jsonl:1",
        "a.jsonl:60",
        "b.jsonl:1",
        "b.jsonl:20",
    ]


@pytest.mark.parametrize("changed", ["num_lanes", "seed", "packing", "seq_len", "shuffle", "weights", "sources"])
def test_a_position_in_other_data_is_refused(sources, shards_of, changed):
    options = {"num_lanes": 4, "seed": 4, "packing": "concat", "seq_len": 8, "shuffle": False}
    saved = open_loader(sources).state()
    if changed == "weights":
        other = open_loader(sources, [1, 1])
    elif changed == "sources":
        other = open_loader([*sources, corpus(shards_of, 3, 4)])
    else:
        other = open_loader(sources, **{changed: options[changed]})
    message = {"num_lanes": "num_lanes changed from 8 to 4", "weights": "sources changed from"}.get(changed, changed)
    with pytest.raises(InputError, match=rf"data position: cannot be restored, because .*{message}"):
        other.restore(saved)


def test_a_position_without_a_lane_is_refused(sources):
    states = open_loader(sources, lanes=[0, 1]).state()
    with pytest.raises(InputError, match=r"data position: lane 2 is missing; found the lanes \[0, 1\]"):
        open_loader(sources, lanes=[1, 2]).restore(states)


def test_what_cannot_be_loaded_is_refused(sources):
    for weights, problem in [
        ([1.0, None], r"\[1\]\.weight: missing"),
        ([0.0, 1], r"\[0\]\.weight: found 0\.0"),
        ([1, float("nan")], r"\[1\]\.weight: found nan"),
    ]:
        with pytest.raises(InputError, match=problem):
            open_loader(sources, weights)
    with pytest.raises(InputError, match=r"data\.train: no sources"):
        open_loader([])
    for batch_size in (12, 0):
        with pytest.raises(InputError, match=rf"8 lanes do not divide a batch of {batch_size} rows"):
            open_loader(sources).next_batch(batch_size)


def test_lanes_and_boundaries_have_defaults():
    assert [default_num_lanes(sizes) for sizes in ([256], [4], [32, 64], [8, 24], [6, 96], [7])] == [
        64,
        64,
        64,
        8,
        2,
        1,
    ]
    assert boundary_ids(types.SimpleNamespace(bos_id=1, eos_id=2)) == (1, 2)
    assert boundary_ids(types.SimpleNamespace(bos_id=None, eos_id=2)) == (2, 2)
    with pytest.raises(InputError, match="no end-of-text token"):
        boundary_ids(types.SimpleNamespace(bos_id=1, eos_id=None))


def batch_size_at(step):
    return 8 if step < 3 else 16


def test_prefetching_changes_neither_batches_nor_positions(sources):
    plain = open_loader(sources)
    with Prefetcher(open_loader(sources), batch_size_at, depth=3) as batches:
        assert batches.state() == plain.state()
        for step in range(6):
            assert_equal(batches.next_batch(), plain.next_batch(batch_size_at(step)))
            assert batches.state() == plain.state()
        states = batches.state()
    resumed = open_loader(sources)
    resumed.restore(states)
    with Prefetcher(resumed, batch_size_at, start_step=6, depth=1) as batches:
        assert_equal(batches.next_batch(), plain.next_batch(16))


def test_an_error_while_prefetching_reaches_the_caller(sources):
    with Prefetcher(open_loader(sources), lambda step: 9 if step == 2 else 8, depth=4) as batches:
        batches.next_batch()
        batches.next_batch()
        for _ in range(2):
            with pytest.raises(InputError, match=r"8 lanes do not divide a batch of 9 rows"):
                batches.next_batch()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetching_nothing_is_refused(sources):
    with pytest.raises(InputError, match=r"data\.prefetch: found 0, expected at least 1"):
        Prefetcher(open_loader(sources), batch_size_at, depth=0)


@pytest.mark.parametrize("packing", ["packed", "concat"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_heldout_reads_every_document_once_and_in_order(sources, packing, batch_size):
    options = {"seq_len": 16, "packing": packing, "batch_size": batch_size, "start_id": START, "eos_id": EOS}
    batches = list(heldout_batches(sources, **options))
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert joined["tokens"].shape == (len(batches) * batch_size, 16)
    real = joined["loss_weights"] == 1
    targets = [[*shards.tokens(i).tolist(), EOS] for shards in sources for i in range(len(shards))]
    assert joined["targets"][real].tolist() == [target for document in targets for target in document]
    assert joined["document_ids"][real].tolist() == [n for n, document in enumerate(targets) for _ in document]
    assert (joined["segment_ids"] > 0).tolist() == real.tolist()
    assert len(batches) == -(-real.sum() // (16 * batch_size))
