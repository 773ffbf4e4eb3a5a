"""Rows of examples: nothing is lost or trained twice, and packing changes nothing but where an example lies."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.example_rows import ExampleRowIterator, ExampleRows, PreferenceRows, PromptRows
from jaxllm.data.loader import Prefetcher, TrainLoader, heldout_batches, padding_row
from jaxllm.errors import InputError
from jaxllm.families import spec as published_spec
from jaxllm.nn.model import apply
from jaxllm.spec import tiny
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.chat import IGNORED
from tests.data.chats import make_encoder, make_set, talk
from tests.tiny_models import LLAMA, make_batch, random_params

FIELDS = ("tokens", "targets", "loss_weights", "positions", "block_positions", "prefix_mask")


def conversations(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"messages": talk(*("x" * int(rng.integers(1, 12)) + str(n) for _ in range(2 * int(rng.integers(1, 3)))))}
        for n in range(num_rows)
    ]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of conversations."""
    return [make_set(tmp_path_factory.mktemp(f"set{n}"), conversations(n, seed=n)) for n in (9, 23)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {
            "prompt": "q" * (1 + n % 5),
            "chosen": f"good {n}",
            "rejected": f"bad{n}",
            "margin": ["better", "slightly"][n % 2],
        }
        for n in range(11)
    ]
    return make_set(tmp_path_factory.mktemp("pairs"), rows, "preference")


def rule_of(encoder=None, packed=True):
    return ExampleRows(places=(encoder or make_encoder()).places, packed=packed)


def examples_in(row):
    """Return the fields of each segment of a row, as a multiset."""
    found = collections.Counter()
    for segment in range(1, row["segment_ids"].max() + 1):
        slots = row["segment_ids"] == segment
        found[tuple(row[name][slots].tobytes() for name in FIELDS if name in row)] += 1
    return found


def all_rows(examples, rule, seq_len):
    return list(ExampleRowIterator(rule.items(examples, seq_len), seq_len, rule))


@pytest.mark.parametrize("name", ["chatml", "chatglm", "baichuan2"])
@given(seq_len=st.integers(100, 300))
@settings(max_examples=10, deadline=None)
def test_packed_rows_hold_the_examples_of_padded_rows(tmp_path_factory, name, seq_len):
    encoder = make_encoder(name)
    examples = make_set(tmp_path_factory.mktemp("rows"), conversations(12), encoder=encoder)
    packed, padded = (all_rows(examples, rule_of(encoder, packed), seq_len) for packed in (True, False))
    assert len(packed) < len(padded) == len(examples)
    both = [sum(map(examples_in, rows), collections.Counter()) for rows in (packed, padded)]
    assert both[0] == both[1] and both[0].total() == len(examples)
    for row in packed:
        assert (row["document_ids"] == -1).tolist() == (row["segment_ids"] == 0).tolist()
        assert not row["loss_weights"][row["segment_ids"] == 0].any()


def test_every_trained_prediction_occurs_once(sets):
    examples = sets[1]
    wanted = collections.Counter(
        (number, place, int(label))
        for number in range(len(examples))
        for place, label in enumerate(examples.tokens(number)[0].labels[1:])
        if label != IGNORED
    )
    found = collections.Counter()
    for row in all_rows(examples, rule_of(), 128):
        for slot in np.flatnonzero(row["loss_weights"]):
            found[(int(row["document_ids"][slot]), int(row["positions"][slot]), int(row["targets"][slot]))] += 1
    assert found == wanted and set(found.values()) == {1}
    assert found.total() == examples.index.num_trained


def test_slots_are_the_ids_and_the_last_one_of_an_example_predicts_nothing(sets):
    (row, *_) = all_rows(sets[0], rule_of(), 256)
    (tokens,) = sets[0].tokens(0)
    size = len(tokens.ids)
    assert row["tokens"][:size].tolist() == tokens.ids.tolist()
    is_trained = tokens.labels[1:] != IGNORED
    assert row["loss_weights"][:size].tolist() == [*is_trained.astype(float), 0.0]
    assert row["targets"][: size - 1][is_trained].tolist() == tokens.labels[1:][is_trained].tolist()
    assert row["positions"][: size + 1].tolist() == [*range(size), 0]


@given(st.integers(0, 12))
@settings(max_examples=13, deadline=None)
def test_rows_go_on_where_they_were_left(sets, taken):
    rule = rule_of()
    items = rule.items(sets[1], 96)
    whole, parts, again = (ExampleRowIterator(items, 96, rule) for _ in range(3))
    for _ in range(taken):
        next(parts, None)
    again.set_state(json.loads(json.dumps(parts.get_state())))
    rest = list(again)
    expected = list(whole)[taken:]
    assert len(rest) == len(expected)
    for row, other in zip(rest, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(row[name], other[name])


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_lanes_go_on_exactly_after_json_whoever_reads_them(sets, pairs, kind):
    sources, rule = (sets, rule_of()) if kind == "sft" else ([pairs], PreferenceRows(places=make_encoder().places))

    def loader(lanes=None):
        return TrainLoader(sources, seq_len=160, packing=rule, num_lanes=4, seed=7, lanes=lanes)

    alone = loader()
    for _ in range(3):
        alone.next_batch(8)
    states = {int(lane): state for lane, state in json.loads(json.dumps(alone.state())).items()}
    halves = [loader([0, 1]), loader([2, 3])]
    for half in halves:
        half.restore(states)
    for _ in range(3):
        batch, parts = alone.next_batch(8), [half.next_batch(8) for half in halves]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


def test_a_changed_rule_is_no_place_to_go_on_from(sets):
    options = {"seq_len": 128, "num_lanes": 2, "seed": 0}
    packed = TrainLoader(sets, packing=rule_of(), **options)
    padded = TrainLoader(sets, packing=rule_of(packed=False), **options)
    with pytest.raises(InputError, match="data position: cannot be restored, because packing changed"):
        padded.restore(packed.state())


def test_weights_are_shares_of_the_tokens(sets):
    loader = TrainLoader(sets, [3.0, 1.0], seq_len=128, packing=rule_of(), num_lanes=1, seed=0)
    seen = np.concatenate([loader.next_batch(4)["document_ids"].ravel() for _ in range(40)])
    share = np.mean(seen[seen >= 0] < len(sets[0]))
    assert share == pytest.approx(0.75, abs=0.04)


def test_texts_are_mixed_in_by_weight(tmp_path, sets):
    (tmp_path / "a.txt").write_text("once upon a time " * 40)
    (tmp_path / "texts").mkdir()
    texts = make_set(tmp_path / "texts", [{"text": "once upon a time " * 9}] * 3, seq_len=64)
    assert len(texts) > 3
    loader = TrainLoader([sets[0], texts], [1.0, 1.0], seq_len=96, packing=rule_of(), num_lanes=2, seed=0)
    batch = loader.next_batch(64)
    is_text = batch["document_ids"] >= len(sets[0])
    assert 0.4 < is_text.sum() / (batch["document_ids"] >= 0).sum() < 0.6
    # Of a piece all but the last slot predict.
    pieces = sum(len(np.unique(row["segment_ids"][row["document_ids"] >= len(sets[0])])) for row in split(batch))
    assert batch["loss_weights"][is_text].sum() == is_text.sum() - pieces
    assert "rows.jsonl:" in loader.describe(batch["document_ids"][is_text])[0]


def split(batch):
    return [{name: array[k] for name, array in batch.items()} for k in range(len(batch["tokens"]))]


def test_heldout_reads_every_example_once(sets, pairs):
    batches = list(heldout_batches(sets, seq_len=160, packing=rule_of(), batch_size=3))
    seen = [example for batch in batches for row in split(batch) for example in examples_in(row).elements()]
    assert len(seen) == sum(map(len, sets))
    rule = PreferenceRows(places=make_encoder().places, pairs_per_row=2)
    batches = list(heldout_batches([pairs], seq_len=160, packing=rule, batch_size=4))
    assert sum(batch["pair_weights"].sum() for batch in batches) == len(pairs)
    assert batches[-1].keys() == padding_row(160, rule).keys()


def test_prefetching_serves_examples_too(sets):
    options = {"seq_len": 128, "packing": rule_of(), "num_lanes": 2, "seed": 0}
    alone = TrainLoader(sets, **options)
    with Prefetcher(TrainLoader(sets, **options), lambda step: 4) as ahead:
        for _ in range(3):
            np.testing.assert_array_equal(ahead.next_batch()["tokens"], alone.next_batch(4)["tokens"])


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_are_two_segments_of_one_row(pairs, packed):
    rule = PreferenceRows(places=make_encoder().places, packed=packed, pairs_per_row=3, margins="large")
    seen = []
    for row in all_rows(pairs, rule, 400):
        count = int(row["pair_weights"].sum())
        assert row["pair_weights"].tolist() == [1.0] * count + [0.0] * (rule.most_items - count)
        assert row["segment_ids"].max() == 2 * count <= (6 if packed else 2)
        for k in range(count):
            number = int(row["document_ids"][row["ends"][k, 0]])
            seen.append(number)
            assert row["margins"][k] == [2.0, 1.0][number % 2]
            for side, tokens in enumerate(pairs.tokens(number)):
                slots = np.flatnonzero(row["segment_ids"] == 2 * k + 1 + side)
                assert row["ends"][k, side] == slots[-1]
                assert row["tokens"][slots].tolist() == tokens.ids.tolist()
                assert row["loss_weights"][slots].sum() == tokens.num_trained
        assert not row["ends"][count:].any() and not row["margins"][count:].any()
    assert seen == list(range(len(pairs)))


def test_known_log_probabilities_of_a_reference_travel_with_their_pairs(pairs):
    known = np.arange(2.0 * len(pairs), dtype=np.float32).reshape(-1, 2)
    rule = PreferenceRows(places=make_encoder().places, ref_logps=known)
    loader = TrainLoader([pairs], seq_len=300, packing=rule, num_lanes=2, seed=3)
    for row in split(loader.next_batch(4)):
        for k in np.flatnonzero(row["pair_weights"]):
            assert row["ref_logps"][k].tolist() == known[row["document_ids"][row["ends"][k, 1]]].tolist()


@pytest.mark.parametrize(("margins", "expected"), [("none", 0.0), ("small", 2 / 3), ("large", 2.0)])
def test_margins_of_labels(pairs, margins, expected):
    rule = PreferenceRows(places=make_encoder().places, margins=margins)
    assert rule.items(pairs, 400)[0].margin == pytest.approx(expected)


def test_margins_of_another_kind_are_refused(tmp_path, pairs):
    rule = PreferenceRows(places=make_encoder().places, margins="data")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: margin: found a label or nothing, expected a number"):
        rule.items(pairs, 400)
    numbered = [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.25}]
    numbers = make_set(tmp_path, numbered, "preference")
    assert rule.items(numbers, 400)[0].margin == 0.25
    with pytest.raises(InputError, match=r"expected one of significantly, .*, negligible for margins 'large'"):
        dataclasses.replace(rule, margins="large").items(numbers, 400)


def test_prompts_come_with_their_length_and_row(tmp_path):
    rows = [{"prompt": f"what is {n}?", "answer": n, "level": "easy"} for n in range(5)]
    encoder = make_encoder()
    prompts = make_set(tmp_path, rows, "prompt", encoder, system="Be brief.")
    rule = PromptRows(places=encoder.places)
    loader = TrainLoader([prompts], seq_len=80, packing=rule, num_lanes=1, seed=0)
    batch = loader.next_batch(5)
    assert {name: array.shape for name, array in batch.items()} == {
        "tokens": (5, 80),
        "length": (5,),
        "document_ids": (5,),
    }
    assert sorted(batch["document_ids"].tolist()) == list(range(5))
    for row in split(batch):
        prompt = loader.prompt(int(row["document_ids"]))
        assert prompt.reference == prompt.row["answer"]
        assert prompt.row["_origin"].endswith(f"rows.jsonl:{prompt.reference + 1}")
        text = encoder.tokenizer.decode(row["tokens"][: row["length"]].tolist())
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and text.endswith("<|im_start|>assistant\n")
        assert f"what is {prompt.reference}?" in text and not row["tokens"][row["length"] :].any()
    held = list(heldout_batches([prompts], seq_len=80, packing=rule, batch_size=4))
    assert [batch["document_ids"].tolist() for batch in held] == [[0, 1, 2, 3], [4, -1, -1, -1]]


def test_sets_of_another_purpose_or_of_longer_examples_are_refused(sets, pairs):
    places = make_encoder().places
    with pytest.raises(InputError, match="found sft examples, expected preference examples"):
        PreferenceRows(places=places).items(sets[0], 400)
    with pytest.raises(InputError, match=r"found an example of .* tokens, expected at most 20"):
        ExampleRows(places=places).items(sets[0], 20)


class Golden(Tokenizer):
    """The character tokenizer of the goldens."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 300_000, None, None, None, "characters"

    def __init__(self, special_tokens, offset):
        self.special_tokens, self._offset = special_tokens, offset

    def encode(self, text, *, allow_special=False):
        return [self._offset + ord(character) for character in text]

    def encode_to_numpy(self, text):
        return np.array(self.encode(text), np.int32)

    def token_bytes(self, token_id):
        return chr(token_id - self._offset).encode()

    def save(self, folder):
        raise InputError("characters are not saved")


@pytest.mark.parametrize(
    ("name", "labels", "key"),
    [
        ("chatml-qwen", "published", "qwen_labels_finetune_py"),
        ("chatml-qwen", "assistant", "qwen_labels_strict_assistant_only"),
        ("baichuan2", "published", "baichuan2_labels"),
    ],
)
def test_rows_train_what_the_published_scripts_train(tmp_path, goldens, name, labels, key):
    with np.load(goldens / "chat_label_masks.npz", allow_pickle=False) as file:
        golden = dict(file)
    family = key.partition("_")[0]
    specials = {"<|im_start|>": int(golden["im_start"]), "<|im_end|>": int(golden["im_end"]), "<|endoftext|>": 299_999}
    tokenizer = Golden(specials, 0) if family == "qwen" else Golden({}, 1000)
    encoder = dataclasses.replace(make_encoder(name, labels=labels), tokenizer=tokenizer)
    rows = [{"messages": talk("hi", "yo!", "a b", "c")}, {"messages": talk("q", "long answer")}]
    system = str(golden["system"]) if family == "qwen" else None
    examples = make_set(tmp_path, rows, encoder=encoder, system=system)
    for number, row in enumerate(all_rows(examples, rule_of(encoder, packed=False), 128)):
        length = int(golden[f"{family}_attention_mask"][number].sum())
        expected = golden[key][number, 1:length]
        assert row["tokens"][:length].tolist() == golden[f"{family}_input_ids"][number, :length].tolist()
        weights = row["loss_weights"][: length - 1]
        assert weights.tolist() == (expected != IGNORED).astype(float).tolist()
        assert row["targets"][: length - 1][weights == 1].tolist() == expected[expected != IGNORED].tolist()


@pytest.mark.parametrize("name", ["chatml", "chatglm"])
def test_packed_and_padded_rows_have_the_same_log_probabilities(tmp_path, name):
    encoder = make_encoder(name)
    spec = LLAMA if name == "chatml" else tiny(published_spec("chatglm-6b"))
    spec = dataclasses.replace(spec, vocab_size=300, max_position_embeddings=128)
    params = random_params(spec)
    examples = make_set(tmp_path, conversations(4), encoder=encoder)

    @jax.jit
    def log_probabilities(batch):
        return jax.nn.log_softmax(apply(spec, params, batch, train=False).logits)

    sums = []
    for packed in (True, False):
        found = {}
        for row in all_rows(examples, rule_of(encoder, packed), 256):
            fields = {name: row[name][None] for name in ("block_positions", "prefix_mask") if name in row}
            batch = make_batch(row["tokens"][None], row["segment_ids"][None], row["positions"][None], **fields)
            logps = np.asarray(log_probabilities(batch))[0, np.arange(256), row["targets"]]
            for number in np.unique(row["document_ids"][row["segment_ids"] > 0]):
                mine = row["document_ids"] == number
                found[int(number)] = float((logps * row["loss_weights"])[mine].sum())
        sums.append(found)
    assert sums[0].keys() == sums[1].keys() == set(range(4))
    np.testing.assert_allclose(*[[s[n] for n in range(4)] for s in sums], rtol=1e-5)
