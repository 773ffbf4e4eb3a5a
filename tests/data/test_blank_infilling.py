"""Blanks are cut and laid out as in GLM's published code, and fill the same rows whoever reads them."""

import collections
import dataclasses
import itertools
import json
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import BlankInfillingConfig, BlankTokensConfig
from jaxllm.data.blank_infilling import (
    BlankIds,
    build_blanks,
    build_rest,
    documents_in,
    draw_span_lengths,
    place_spans,
    sentences_in,
    spans_in_documents,
    whole_sentences,
)
from jaxllm.data.blank_rows import BlankInfilling, BlankRowIterator
from jaxllm.data.loader import TrainLoader, heldout_batches, padding_row
from jaxllm.data.packing import Pieces, stack_rows
from jaxllm.errors import InputError
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE
from tests.conftest import GOLDENS

GOLDEN = json.loads((GOLDENS / "glm-blank-infilling-data" / "golden.json").read_text())
STATISTICS = GOLDEN["statistics_of_published_10B_flags"]
NAMES = {"mask": "MASK", "smask": "sMASK", "gmask": "gMASK", "sop": "sop", "eop": "eop", "eos": "eos", "cls": "ENC"}
TOY = BlankIds(**{ours: GOLDEN["special_ids"][theirs] for ours, theirs in NAMES.items()}, dblock=8)
TOY_ENDS = np.arange(200) % 10 == 9

START, EOS = 900, 901
IDS = BlankIds(mask=902, smask=903, gmask=904, sop=905, eop=906, eos=EOS, cls=907, dblock=908)
ENDS = np.arange(1000) < 90
T = 128


def task(ids=IDS, two_positions=True, **options):
    return BlankInfilling(BlankInfillingConfig(**options), ids, ENDS, two_positions)


def toy_text(rng, length=512):
    """A text as the golden statistics were made of: [CLS], random tokens, and the end of the text."""
    return np.concatenate([[TOY.cls], rng.integers(10, 200, length - 2), [TOY.eos]])


def assert_is(sample, case):
    names = {
        "tokens": "tokens",
        "targets": "targets",
        "loss_weights": "loss_mask",
        "positions": "position_ids",
        "block_positions": "block_position_ids",
        "context_length": "sep",
    }
    for ours, theirs in names.items():
        np.testing.assert_array_equal(getattr(sample, ours), case[theirs], err_msg=ours)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case.get("task", case["kind"]))
def test_layouts_are_the_published_ones(case):
    text = np.array(case["text"])
    if case["kind"] == "gpt_division":
        assert_is(build_rest(text, case["sep"] - 1, ids=TOY, positions_count_on=False), case)
        return
    mask_id = {"bert": TOY.mask, "gap_sentence": TOY.smask, "generation": TOY.gmask}[case["task"]]
    assert_is(build_blanks(text, case["spans_in_target_order"], mask_id=mask_id, ids=TOY), case)


def test_positions_count_on_where_there_is_only_one():
    sample = build_rest(np.arange(10, 16), 2, ids=TOY, positions_count_on=True)
    assert sample.tokens.tolist() == [10, 11, TOY.gmask, TOY.sop, 12, 13, 14]
    assert sample.targets[2:].tolist() == [TOY.gmask, 12, 13, 14, 15]
    assert sample.positions.tolist() == list(range(7))
    assert sample.source.tolist() == [0, 1, 2, 2, 2, 3, 4]


def test_what_opens_a_document_is_no_target():
    text = np.array([TOY.cls, 10, 11, TOY.eos, TOY.cls, 12, 13])
    sample = build_rest(text, 3, ids=TOY, positions_count_on=False)
    trained = sample.targets[sample.loss_weights > 0].tolist()
    assert trained == [TOY.eos, 12, 13]


def text_of(tokens, targets, positions):
    """Put what was missing in one sample back into its place."""
    context = int((tokens == IDS.sop).argmax())
    missing, where = {}, None
    for token, target, position in zip(tokens[context:], targets[context:], positions[context:], strict=True):
        where = int(position) if token == IDS.sop else where
        missing.setdefault(where, []).append(int(target))
    rebuilt = []
    for slot, token in enumerate(tokens[:context].tolist()):
        if token in (IDS.mask, IDS.smask, IDS.gmask):
            # Where positions count on, the <sop> is one further than its [gMASK].
            rebuilt += missing.get(slot, missing.get(slot + 1, []))
        else:
            rebuilt.append(token)
    return [token for token in rebuilt if token != IDS.eop]


def segments_of(row):
    """Return (tokens, targets, positions) of each text of a row."""
    for segment in range(1, row["segment_ids"].max() + 1):
        inside = row["segment_ids"] == segment
        yield [row[name][inside] for name in ("tokens", "targets", "positions")]


@given(st.integers(0, 2**32 - 1), st.integers(2, 80))
def test_blanks_and_what_was_missing_are_the_text(seed, length):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 900, length)
    lengths = draw_span_lengths(rng, length, ratio=0.3, mean=3.0)
    spans = spans_in_documents(rng, text, lengths, ratio=0.3, ids=IDS)
    if not spans:
        return
    hidden = np.full(length, IDS.dblock)
    sample = build_blanks(text, spans, mask_id=IDS.mask, ids=IDS, inputs=hidden)
    assert text_of(sample.tokens, sample.targets, sample.positions) == text.tolist()
    assert len(sample.tokens) == length + 2 * len(spans)
    assert (sample.tokens[sample.context_length :] >= IDS.sop).all()
    assert sample.loss_weights.sum() == sum(lengths) + len(lengths)
    inside = sample.tokens != IDS.sop
    assert (text[sample.source[inside & (sample.loss_weights > 0)]] < 900).all()


def test_span_lengths_follow_a_cut_poisson_distribution():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([draw_span_lengths(rng, 10_000, ratio=0.5, mean=3.0)[:-1] for _ in range(50)])
    expected = {int(k): share for k, share in STATISTICS["truncated_poisson_expected"].items()}
    assert lengths.min() == 1 and lengths.max() <= 39
    for length, share in expected.items():
        error = 4 * np.sqrt(share / len(lengths)) + 5e-5
        assert abs((lengths == length).mean() - share) < error


@given(st.integers(0, 2**32 - 1), st.integers(0, 600), st.sampled_from([0, 2]))
def test_spans_hide_as_much_as_asked_and_no_span_more(seed, num_tokens, slots):
    lengths = draw_span_lengths(np.random.default_rng(seed), num_tokens, ratio=0.15, mean=3.0, slots_per_span=slots)
    budgets = [int(0.15 * (num_tokens - slots * count)) for count in range(len(lengths) + 1)]
    hidden = [0, *np.cumsum(lengths).tolist()]
    assert hidden[-1] >= budgets[-1]
    assert all(less < budget for less, budget in zip(hidden[1:-1], budgets[1:-1], strict=True))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 9))
def test_placed_spans_keep_their_order_and_a_token_between_them(seed, lengths, spare):
    needed = sum(lengths) + len(lengths) - 1
    spans = place_spans(np.random.default_rng(seed), np.array(lengths), 5, needed + spare)
    assert [end - start for start, end in spans] == lengths
    assert spans[0][0] >= 5 and spans[-1][1] <= 5 + needed + spare
    assert all(later[0] > earlier[1] for earlier, later in itertools.pairwise(spans))


def test_every_placement_occurs():
    rng = np.random.default_rng(0)
    seen = {tuple(place_spans(rng, np.array([2, 1]), 0, 5)) for _ in range(200)}
    assert seen == {((0, 2), (3, 4)), ((0, 2), (4, 5)), ((1, 3), (4, 5))}


DOCUMENT_LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(st.integers(0, 2**32 - 1), DOCUMENT_LENGTHS, st.booleans())
def test_spans_stay_within_documents_and_shorter_ones_give_no_more_than_their_share(seed, lengths, ended):
    rng = np.random.default_rng(seed)
    parts = [[IDS.cls, *rng.integers(0, 900, length), IDS.eos] for length in lengths]
    text = np.concatenate(parts)[: None if ended else -1]
    documents = documents_in(text, IDS)
    assert [end - begin for begin, end in documents] == lengths
    spans = spans_in_documents(rng, text, draw_span_lengths(rng, len(text), ratio=0.15, mean=3.0), ratio=0.15, ids=IDS)
    hidden = collections.Counter()
    for start, end in spans or []:
        (document,) = [span for span in documents if span[0] <= start and end <= span[1]]
        hidden[document] += end - start
        assert ended or end < len(text)
    longest = max(lengths)
    assert all(end - begin == longest or count <= int(0.15 * (end - begin)) for (begin, end), count in hidden.items())


def test_spans_that_do_not_all_fit_are_none_at_all():
    text = np.array([IDS.cls, 1, 2, 3, 4, IDS.eos])
    rng = np.random.default_rng(0)
    assert sorted(spans_in_documents(rng, text, np.array([1, 2]), ratio=0.15, ids=IDS))[-1][1] <= 5
    assert spans_in_documents(rng, text, np.array([2, 2]), ratio=0.15, ids=IDS) is None


def test_sentences():
    # Ids below 90 end a sentence.
    text = np.array([IDS.cls, 500, 1, 2, 600, IDS.eos, IDS.cls, 700, 3, 800, 801])
    sentences = [(1, 3), (3, 4), (7, 9), (9, 11)]
    assert sentences_in(text, ENDS, IDS) == sentences
    assert whole_sentences(text, ENDS, IDS) == 9
    assert whole_sentences(text[9:], ENDS, IDS) == 2
    assert whole_sentences(np.array([1, 500, 501, 502, 503, 504]), ENDS, IDS) == 6


def mean_within_error(values, golden_mean, golden_count):
    """Whether two sample means agree to four standard errors of their difference."""
    error = np.std(values) * np.sqrt(1 / len(values) + 1 / golden_count)
    return abs(np.mean(values) - golden_mean) < 4 * error


def test_statistics_of_the_published_flags():
    rng = np.random.default_rng(0)
    ten_billion = BlankInfilling(BlankInfillingConfig(), TOY, TOY_ENDS, True)
    kinds = collections.Counter(ten_billion.draw_kind(rng) for _ in range(20_000))
    counts = STATISTICS["modes"]
    for kind, mode in (("spans", "bert"), ("sentences", "sentence"), ("rest", "gpt")):
        share, golden = kinds[kind] / 20_000, counts[mode] / sum(counts.values())
        assert abs(share - golden) < 4 * np.sqrt(golden * (1 - golden) * (1 / 1500 + 1 / 20_000))

    drawn = [draw_span_lengths(rng, 512, ratio=0.15, mean=3.0) for _ in range(4000)]
    assert mean_within_error([len(lengths) for lengths in drawn], STATISTICS["bert_spans_per_512"][0], counts["bert"])
    ratios = [lengths.sum() / 512 for lengths in drawn]
    assert mean_within_error(ratios, STATISTICS["bert_mask_ratio"][0], counts["bert"])

    samples = {
        kind: [ten_billion.sample(rng, kind, toy_text(rng)) for _ in range(1500)] for kind in ("sentences", "rest")
    }
    hidden = {
        kind: [sample.loss_weights.sum() - (sample.targets == TOY.eop).sum() for sample, _ in found]
        for kind, found in samples.items()
    }
    sentences = [count / used for count, (_, used) in zip(hidden["sentences"], samples["sentences"], strict=True)]
    assert min(sentences) >= int(0.15 * 512) / 512 - 0.01
    assert mean_within_error(sentences, STATISTICS["sentence_ratio"][0], counts["sentence"])
    rests = [count / used for count, (_, used) in zip(hidden["rest"], samples["rest"], strict=True)]
    assert min(rests) >= STATISTICS["gpt_target_fraction"][1] - 0.01 and max(rests) < 1
    assert mean_within_error(rests, STATISTICS["gpt_target_fraction"][0], counts["gpt"])
    with_end = np.mean([(sample.targets == TOY.eop).any() for sample, _ in samples["rest"]])
    assert abs(with_end - 0.5) < 4 * np.sqrt(0.25 / 1500)


def test_hidden_inputs():
    rng = np.random.default_rng(0)
    hiding = BlankInfilling(BlankInfillingConfig(hide_prob=0.1), TOY, TOY_ENDS, True)
    samples = [hiding.sample(rng, "spans", toy_text(rng))[0] for _ in range(200)]
    tokens = np.concatenate([sample.tokens[sample.context_length :] for sample in samples])
    inside = tokens != TOY.sop
    share = (tokens[inside] == TOY.dblock).mean()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / inside.sum())
    assert not any((sample.tokens[: sample.context_length] == TOY.dblock).any() for sample in samples)
    assert not any((sample.targets == TOY.dblock).any() for sample in samples)


KINDS = {
    "spans": {"span_prob": 1.0, "sentence_prob": 0.0},
    "sentences": {"span_prob": 0.0, "sentence_prob": 1.0},
    "rest": {"span_prob": 0.0, "sentence_prob": 0.0},
    "single_span": {"single_span_prob": 1.0},
    "mixed": {"samples_per_row": 2, "short_prob": 0.3},
}


def long_documents(shards_of, num=12, seed=0):
    rng = np.random.default_rng(seed)
    return shards_of([rng.integers(0, 900, rng.integers(60, 400)) for _ in range(num)])


def rows_of(shards, task, seq_len=T, **options):
    pieces = Pieces(shards, start_id=START, eos_id=EOS)
    return BlankRowIterator(pieces, seq_len, task, **{"seed": (0,), "equal_rows": False, **options})


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("opened", [True, False])
def test_the_texts_of_all_rows_are_the_documents(shards_of, options, opened):
    shards = long_documents(shards_of)
    ids = IDS if opened else dataclasses.replace(IDS, cls=None)
    rows = list(rows_of(shards, task(ids, **{"short_prob": 0.0, **options}, hide_prob=0.2)))
    found, documents = [], []
    for row in rows:
        for inside in segments_of(row):
            found += [token for token in text_of(*inside) if token != ids.cls]
        documents += row["document_ids"][row["prefix_mask"]].tolist()
    stream = np.concatenate([[*shards.tokens(number), EOS] for number in range(len(shards))]).tolist()
    # What ends the data may be too short for a blank.
    assert found == stream[: len(found)] and len(stream) - len(found) < 10
    assert documents == sorted(documents) and set(documents) == set(range(12))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_rows_are_filled_and_every_text_is_a_segment_with_its_context(shards_of, options):
    rows = list(rows_of(long_documents(shards_of), task(**{"short_prob": 0.0, **options})))
    batch = stack_rows(rows)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "block_positions": "int32",
        "loss_weights": "float32",
        "document_ids": "int64",
        "prefix_mask": "bool",
    }
    inside = batch["segment_ids"] > 0
    if "short_prob" not in options:
        # Each whole row is full but for a few slots.
        assert (inside[:-1].sum(axis=1) >= T - 8).all()
    assert not any(array[~inside].any() for name, array in batch.items() if name != "document_ids")
    assert (batch["document_ids"][~inside] == -1).all()
    assert (batch["prefix_mask"] == (inside & (batch["block_positions"] == 0))).all()
    assert not (batch["loss_weights"] * batch["prefix_mask"]).any()
    assert batch["positions"].max() < T and batch["block_positions"].max() < T
    if options.get("samples_per_row") == 2:
        assert {int(row["segment_ids"].max()) for row in rows} >= {1, 2}


def test_a_row_counts_as_much_as_any_other(shards_of):
    shards = long_documents(shards_of)
    plain, equal = (stack_rows(list(rows_of(shards, task(), equal_rows=flag))) for flag in (False, True))
    assert set(np.unique(plain["loss_weights"])) == {0.0, 1.0}
    np.testing.assert_allclose(equal["loss_weights"].sum(axis=1), 1, rtol=1e-5)
    assert ((equal["loss_weights"] > 0) == (plain["loss_weights"] > 0)).all()


def test_short_texts_end_where_sentences_end(shards_of):
    rows = list(rows_of(long_documents(shards_of), task(short_prob=1.0, span_prob=1.0, sentence_prob=0.0)))
    lengths = {tuple(np.bincount(row["segment_ids"])[1:].tolist()) for row in rows}
    assert len(lengths) > 5 and all(max(parts) < T - 1 for parts in lengths)
    ends = []
    for row in rows:
        ends += [text_of(*inside)[-1] for inside in segments_of(row)]
    assert np.mean([end == EOS or ENDS[end] for end in ends]) > 0.6


def test_the_130b_variant_has_four_texts_or_one_and_single_positions(shards_of):
    ids = dataclasses.replace(IDS, cls=None)
    options = {"span_prob": 0.3, "sentence_prob": 0.0, "samples_per_row": 4, "rest_prob": 1.0, "rest_min_ratio": 0.2}
    variant = task(ids, two_positions=False, short_prob=0.0, **options)
    rows = list(rows_of(long_documents(shards_of, 80), variant, seq_len=256))[:-1]
    texts = collections.Counter(int(row["segment_ids"].max()) for row in rows)
    assert set(texts) == {1, 4}
    assert abs(texts[4] / len(rows) - 0.3) < 4 * np.sqrt(0.21 / len(rows))
    for row in rows:
        assert "block_positions" not in row
        if row["segment_ids"].max() == 1:
            assert row["positions"][:255].tolist() == list(range(255)) and (row["targets"] != IDS.eop).all()
        else:
            assert (row["positions"] < 64).all() and (row["tokens"] == IDS.gmask).sum() == 0
            assert (np.diff(row["segment_ids"]) > 0).nonzero()[0].tolist() == [63, 127, 191]


@settings(max_examples=20)
@given(st.integers(0, 30), st.sampled_from(list(KINDS.values())))
def test_a_saved_position_goes_on_with_the_very_next_row(shards_of, done, options):
    shards = long_documents(shards_of)
    rows = list(rows_of(shards, task(**options)))
    done = min(done, len(rows))
    iterator = rows_of(shards, task(**options))
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    restored = rows_of(shards, task(**options))
    next(restored)
    restored.set_state(state)
    rest = list(restored)
    assert len(rest) == len(rows) - done
    for row, expected in zip(rest, rows[done:], strict=True):
        assert all(np.array_equal(row[name], expected[name]) for name in expected)


def open_loader(shards, packing, **options):
    defaults = {"seq_len": T, "num_lanes": 4, "seed": 3, "start_id": START, "eos_id": EOS}
    return TrainLoader([shards], packing=packing, **{**defaults, **options})


def test_batches_do_not_depend_on_who_reads_them(shards_of):
    shards = long_documents(shards_of, 40)
    alone = open_loader(shards, task())
    readers = [open_loader(shards, task(), lanes=lanes) for lanes in ([0, 1], [2, 3])]
    batches = [alone.next_batch(size) for size in (4, 8, 4)]
    for batch, size in zip(batches, (4, 8, 4), strict=True):
        parts = [reader.next_batch(size) for reader in readers]
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array, err_msg=name)
    # Lanes draw different blanks, and so does another seed.
    assert len({tuple(row) for row in batches[0]["loss_weights"].tolist()}) == 4
    other = open_loader(shards, task(), seed=4, shuffle=False).next_batch(4)
    unshuffled = open_loader(shards, task(), shuffle=False).next_batch(4)
    assert (other["tokens"] != unshuffled["tokens"]).any()
    resumed = open_loader(shards, task())
    resumed.restore({lane: json.loads(json.dumps(state)) for lane, state in alone.state().items()})
    np.testing.assert_array_equal(resumed.next_batch(8)["tokens"], alone.next_batch(8)["tokens"])


def test_a_position_in_another_task_is_refused(shards_of):
    shards = long_documents(shards_of)
    saved = open_loader(shards, task()).state()
    for changed in (task(span_prob=0.4), task(dataclasses.replace(IDS, mask=5)), task(two_positions=False), "packed"):
        with pytest.raises(InputError, match="data position: cannot be restored, because packing changed"):
            open_loader(shards, changed).restore(saved)


def test_heldout_blanks_are_always_the_same_and_tokens_count_alike(shards_of):
    shards = long_documents(shards_of)
    options = {"seq_len": T, "packing": task(), "batch_size": 8, "start_id": START, "eos_id": EOS}
    first, again = (list(heldout_batches([shards], **options)) for _ in range(2))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    assert set(np.unique(first[0]["loss_weights"])) == {0.0, 1.0}
    padding = padding_row(T, task())
    assert {name: row.shape for name, row in padding.items()} == {name: a.shape[1:] for name, a in first[0].items()}
    assert all(np.array_equal(padding[name], first[-1][name][-1]) for name in padding)


def test_documents_without_room_for_blanks_are_refused(shards_of):
    shards = shards_of([[1]] * 100)
    loader = open_loader(shards, task(span_prob=1.0, sentence_prob=0.0), num_lanes=1)
    with pytest.raises(InputError, match=r"100 texts of up to 128 tokens in a row have no room for blanks"):
        loader.next_batch(1)


def tokenizer(*special):
    names = ["<|endoftext|>", *special]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = {name: 256 + number for number, name in enumerate(names)}
    return TiktokenBPE(ranks, pattern=r"[\s\S]", special_tokens=ids, normalization=None, eos_token=names[0])


def test_special_tokens_are_found_by_name_or_given():
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[dBLOCK]"]
    found = BlankInfilling.create(BlankInfillingConfig(), tokenizer(*names), eos_id=256, two_positions=True)
    assert found.ids == BlankIds(mask=257, gmask=258, smask=259, sop=260, eop=261, cls=262, dblock=263, eos=256)
    assert {chr(byte) for byte in np.flatnonzero(found.ends_sentence)} == set(".?!;:\n")
    given = BlankInfillingConfig(tokens=BlankTokensConfig(mask=300))
    assert BlankInfilling.create(given, tokenizer(*names), eos_id=256, two_positions=True).ids.mask == 300
    few = BlankInfillingConfig(task_masks=False, open_with_cls=False, hide_prob=0.0)
    found = BlankInfilling.create(few, tokenizer("[MASK]", "<sop>", "<eop>"), eos_id=256, two_positions=True)
    assert found.ids == BlankIds(mask=257, gmask=257, smask=257, sop=258, eop=259, cls=None, dblock=None, eos=256)
    with pytest.raises(InputError, match=r"tokens\.sop: missing, and the tokenizer has no special token <sop> or"):
        BlankInfilling.create(few, tokenizer("[MASK]", "<eop>"), eos_id=256, two_positions=True)


def test_sentence_ends_in_other_scripts():
    words = types.SimpleNamespace(
        vocab_size=5,
        special_tokens={"!": 4},
        token_bytes=lambda token_id: ["好。".encode(), "…".encode(), b"ab", b"\xe3\x80", b"!"][token_id],
    )
    options = BlankInfillingConfig(tokens=BlankTokensConfig(**dict.fromkeys(NAMES.keys() - {"eos"}, 1), dblock=1))
    found = BlankInfilling.create(options, words, eos_id=4, two_positions=True)
    assert np.flatnonzero(found.ends_sentence).tolist() == [0, 1]
