"""LanguageModel as evaluation users hold it: shapes, errors, scores, streams and stop ids."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.errors import InputError
from jaxllm.generate.boundaries import pad_id
from jaxllm.language_model import LanguageModel
from jaxllm.spec import DynamicNTK, Rope
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE
from tests.tiny_models import LLAMA, random_params

SPECIALS = {"<|end|>": 256, "<|start|>": 257, "<|pad|>": 258}
# One row more than the tokenizer has ids.
SPEC = dataclasses.replace(LLAMA, vocab_size=260, num_layers=2, max_position_embeddings=64)
PROMPT = "Ein Öl 油"


def byte_tokenizer(**names):
    tokens = [bytes([value]) for value in range(256)]
    return TiktokenBPE(tokens, pattern=r"(?s).", special_tokens=SPECIALS, normalization=None, **names)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def speaker(params, text):
    """Return parameters with which each byte of a text is followed by the next one, and the last one by the first."""
    params = jax.tree.map(np.array, params)
    params["layers"]["attention"]["o"]["kernel"][:] = params["layers"]["mlp"]["down"]["kernel"][:] = 0
    for one, following in zip(text.encode(), text.encode()[1:] + text.encode()[:1], strict=True):
        params["head"][:, following] = 10 * params["embedding"][one]
    return params


@pytest.fixture(scope="module")
def lm():
    tokenizer = byte_tokenizer(eos_token="<|end|>", bos_token="<|start|>")
    return LanguageModel(SPEC, random_params(SPEC, seed=3), tokenizer=tokenizer)


def encoded(lm, text):
    return np.array([[257, *lm.tokenizer.encode(text)]])


def test_signatures_are_the_documented_ones():
    def names(function):
        return [name for name in inspect.signature(function).parameters if name != "self"]

    options = ["temperature", "top_k", "top_p", "repetition_penalty", "seed", "eos_ids"]
    places = ["positions", "block_positions", "mask"]
    assert names(LanguageModel.logits) == ["input_ids", "attention_mask", *places, "train"]
    assert names(LanguageModel.forward) == [*names(LanguageModel.logits), "return_hidden", "return_router"]
    assert names(LanguageModel.loss_and_grads) == ["input_ids", "attention_mask", "labels", *places]
    assert names(LanguageModel.generate) == [
        "input_ids", "attention_mask", "max_new_tokens", *options, "use_cache", "return_logits"
    ]  # fmt: skip
    assert names(LanguageModel.stream) == ["prompt", "max_new_tokens", *options]
    assert names(LanguageModel.save_pretrained) == ["path", "dtype"]
    assert names(LanguageModel.chat)[:2] == ["messages", "tools"]
    assert names(jaxllm.load_pretrained) == ["path", "dtype", "mesh", "special_ids", "inv_freq_dtype"]
    assert names(LanguageModel.score)[0] == "texts"


def test_public_names_are_there():
    for name in jaxllm.__all__:
        assert getattr(jaxllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        jaxllm.load_model  # noqa: B018


def test_logits_and_forward_agree(lm):
    ids = np.arange(12).reshape(2, 6)
    logits = lm.logits(ids)
    assert (logits.shape, logits.dtype) == ((2, 6, 260), jnp.float32)
    np.testing.assert_array_equal(logits, lm.forward(ids).logits)
    ones = np.ones_like(ids)
    np.testing.assert_array_equal(logits, lm.logits(ids, ones))
    np.testing.assert_array_equal(logits, lm.logits(ids.tolist(), ones.astype(bool)))
    # Rotations are relative: shifting all positions alike changes only rounding.
    np.testing.assert_allclose(logits, lm.logits(ids, positions=np.arange(6) + 9 + 0 * ids), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [1, 2]}, r"input_ids must be integers \[B, T\], found int64 \(2,\)"),
        ({"input_ids": [[1.0]]}, "input_ids must be integers"),
        ({"input_ids": np.zeros((1, 0), int)}, "input_ids must be integers"),
        ({"input_ids": [[0, 260]]}, "input_ids reach from 0 to 260; the vocabulary has 260"),
        ({"input_ids": [[-1, 5]]}, "input_ids reach from -1 to 5"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask must have shape \(1, 2\), found \(1, 1\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "attention_mask must hold 1, and 0 for padding, found 2"),
        ({"input_ids": [[1, 2]], "positions": [0, 1]}, r"positions must have shape \(1, 2\), found \(2,\)"),
        ({"input_ids": [[1, 2]], "mask": [[1, 1]]}, r"mask must have shape \(1, 2, 2\), found \(1, 2\)"),
    ],
)
def test_faulty_inputs_are_named(lm, arguments, message):
    with pytest.raises(InputError, match=message):
        lm.logits(**arguments)


def test_faulty_generation_inputs_are_named(lm):
    with pytest.raises(InputError, match="max_new_tokens must be an integer of at least 1, found 0"):
        lm.generate([[1]], max_new_tokens=0)
    with pytest.raises(InputError, match="attention_mask: row 1 has no token to continue"):
        lm.generate([[1, 2], [3, 4]], [[1, 1], [0, 0]], max_new_tokens=1)
    with pytest.raises(InputError, match=r"attention_mask must have shape \(1, 2\)"):
        lm.generate([[1, 2]], [[1]], max_new_tokens=1)


def test_loss_and_gradients(lm):
    ids = np.random.default_rng(0).integers(0, 260, (2, 6))
    labels = np.where(np.arange(6) < 3, -100, ids)
    labels[1] = -100
    loss, gradients = lm.loss_and_grads(ids, labels=labels)
    logprobs = log_softmax(lm.logits(ids))
    expected = -np.mean([logprobs[0, t - 1, ids[0, t]] for t in (3, 4, 5)])
    assert abs(loss - expected) < 1e-5
    assert gradients["lm_head.weight"].shape == (260, 24)
    assert gradients["model.layers.1.mlp.down_proj.weight"].shape == (24, 40)
    for bad in (260, -1):
        with pytest.raises(InputError, match=f"labels hold {bad}; expected -100 or 0 to 259"):
            lm.loss_and_grads(ids, labels=np.full_like(ids, bad))
    with pytest.raises(InputError, match="no token is left to train on"):
        lm.loss_and_grads(ids, labels=np.full_like(ids, -100))
    with pytest.raises(InputError, match="labels must have shape"):
        lm.loss_and_grads(ids, labels=ids[:, 1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_gradients(lm, side):
    ids = np.random.default_rng(0).integers(0, 260, (2, 6))
    inside = slice(2, 6) if side == "left" else slice(0, 4)
    mask = np.zeros_like(ids)
    mask[:, inside] = 1
    whole = np.where(mask, ids, 9)
    loss, gradients = lm.loss_and_grads(whole, mask)
    logprobs = log_softmax(lm.logits(whole, mask))
    places = range(inside.start + 1, inside.stop)
    expected = -np.mean([logprobs[row, t - 1, ids[row, t]] for row in range(2) for t in places])
    assert abs(loss - expected) < 1e-5
    other_loss, other = lm.loss_and_grads(np.where(mask, ids, 200), mask)
    assert other_loss == loss
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, other[name])


def test_scores_are_sums_of_log_probabilities(lm):
    texts = [PROMPT, "", "ab", "a longer text than all others"]
    scores = lm.score(texts, batch_size=2)
    for text, score in zip(texts, scores, strict=True):
        ids = lm.tokenizer.encode(text)
        assert score.num_tokens == len(ids)
        row = np.zeros((2, 32), int)
        row[:, : len(ids) + 1] = [257, *ids]
        logprobs = log_softmax(lm.logits(row))[0]
        assert abs(score.sum_logprob - sum(logprobs[t, token] for t, token in enumerate(ids))) < 1e-3
    assert scores[1].sum_logprob == 0


def test_scores_see_the_length_of_a_text_not_of_its_bucket_or_neighbours():
    spec = dataclasses.replace(SPEC, position=Rope(scaling=DynamicNTK(factor=4.0, original_max_position=8)))
    tokenizer = byte_tokenizer(eos_token="<|end|>")
    lm = LanguageModel(spec, random_params(spec, seed=3), tokenizer=tokenizer)
    text = "over the limit"
    ids = np.array([[256, *tokenizer.encode(text)]])
    logprobs = log_softmax(lm.logits(ids))[0]
    expected = sum(logprobs[t, token] for t, token in enumerate(ids[0, 1:]))
    for texts in ([text], [text, "x" * 30]):
        assert abs(lm.score(texts, batch_size=2)[0].sum_logprob - expected) < 1e-3


def test_a_stream_is_the_text_of_generate(lm):
    lm = LanguageModel(SPEC, speaker(lm.params, "油ä"), tokenizer=lm.tokenizer)
    pieces = list(lm.stream("油", max_new_tokens=13, eos_ids=()))
    ids = lm.generate(encoded(lm, "油"), max_new_tokens=13, eos_ids=())[0]
    assert "".join(pieces) == lm.tokenizer.decode(ids) == "ä油ä油ä\N{REPLACEMENT CHARACTER}"
    assert pieces[:5] == ["", "ä", "", "", "油"], "bytes are held back until their character is whole"


def test_a_stream_ends_before_the_stop_id_and_never_says_ids_without_text(lm):
    prompt = encoded(lm, PROMPT)
    free = lm.generate(prompt, max_new_tokens=12, eos_ids=())[0]
    stop = int(free[5])
    first = list(free).index(stop)
    pieces = list(lm.stream(PROMPT, max_new_tokens=12, eos_ids=[stop]))
    assert "".join(pieces) == lm.tokenizer.decode(free[:first])

    # Row 259 of the table means no token; a model that always prefers it must still be heard.
    params = lm.params | {"head": np.array(lm.params["head"])}
    params["head"][:, 259] = params["head"][:, 65] * 10
    odd = LanguageModel(SPEC, params, tokenizer=lm.tokenizer)
    assert 259 in odd.generate(prompt, max_new_tokens=12, eos_ids=())
    assert len("".join(odd.stream(PROMPT, max_new_tokens=12, eos_ids=()))) > 0


def test_a_stream_longer_than_the_models_positions_is_refused(lm):
    with pytest.raises(InputError, match="the model has 64 positions"):
        next(lm.stream(PROMPT, max_new_tokens=60))


def test_a_lone_text_is_not_scored_letter_by_letter(lm):
    with pytest.raises(InputError, match=r"pass \[text\]"):
        lm.score("abc")


def test_an_empty_prompt_starts_a_document(lm):
    for tokenizer, start in ((lm.tokenizer, 257), (byte_tokenizer(eos_token="<|end|>"), 256)):
        model = LanguageModel(SPEC, lm.params, tokenizer=tokenizer)
        expected = model.generate([[start]], max_new_tokens=4, eos_ids=())[0]
        assert "".join(model.stream("", max_new_tokens=4, eos_ids=())) == tokenizer.decode(expected)
    with pytest.raises(InputError, match="neither a beginning- nor an end-of-text token"):
        list(LanguageModel(SPEC, lm.params, tokenizer=byte_tokenizer()).stream("", max_new_tokens=4))


def test_without_a_tokenizer_text_is_refused():
    lm = LanguageModel(SPEC, {})
    for call in (lambda: lm.score(["x"]), lambda: list(lm.stream("x", max_new_tokens=1))):
        with pytest.raises(InputError, match="loaded without a tokenizer; put its files into the model folder"):
            call()


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "stops", "pad"),
    [
        ({"eos_token_id": [7, 9], "pad_token_id": 3}, {"eos_token_id": 1}, None, [7, 9], 3),
        ({"eos_token_id": 7}, {"eos_token_id": 1, "pad_token_id": 4}, None, [7], 4),
        ({}, {"eos_token_id": 1, "pad_token_id": -1}, None, [1], 1),
        ({}, None, byte_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"), [256], 258),
        ({}, None, byte_tokenizer(eos_token="<|end|>"), [256], 256),
        ({}, {}, None, [], 0),
    ],
)
def test_where_stop_and_pad_ids_come_from(lm, generation, config, tokenizer, stops, pad):
    model = LanguageModel(SPEC, lm.params, tokenizer=tokenizer, config=config, generation_config=generation)
    assert model._stop_ids(None) == stops
    assert pad_id(model._published, tokenizer, stops) == pad
    assert model._stop_ids([5]) == [5]
    assert model._stop_ids(()) == []


def test_the_checkpoints_own_stop_ids_apply_by_default(lm):
    prompt = encoded(lm, PROMPT)
    free = lm.generate(prompt, max_new_tokens=12, eos_ids=())[0]
    stop = int(free[5])
    at = list(free).index(stop)
    model = LanguageModel(SPEC, lm.params, generation_config={"eos_token_id": [stop], "pad_token_id": 8})
    np.testing.assert_array_equal(model.generate(prompt, max_new_tokens=12)[0], free[: at + 1])
    assert model.generate(prompt, max_new_tokens=12, eos_ids=()).shape == (1, 12)


def test_right_and_left_padding_continue_alike(lm):
    plain = lm.generate([[5, 6]], max_new_tokens=8, eos_ids=())
    for ids, mask in (([[0, 0, 5, 6]], [[0, 0, 1, 1]]), ([[5, 6, 9, 9]], [[1, 1, 0, 0]])):
        np.testing.assert_array_equal(lm.generate(ids, mask, max_new_tokens=8, eos_ids=()), plain)


def test_a_saved_model_loads_back_with_its_tokenizer(lm, tmp_path):
    lm.save_pretrained(tmp_path / "made")
    loaded = jaxllm.load_pretrained(tmp_path / "made")
    assert loaded.spec == lm.spec
    assert loaded.tokenizer.fingerprint == lm.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)
    loaded.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_loading_in_bfloat16_computes_in_bfloat16(tmp_path, lm):
    lm.save_pretrained(tmp_path / "made")
    loaded = jaxllm.load_pretrained(tmp_path / "made", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    output = loaded.forward(np.arange(12).reshape(2, 6))
    assert (output.hidden.dtype, output.logits.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = np.asarray(lm.params["embedding"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(loaded.params["embedding"], rounded)
    exact = lm.logits(np.arange(12).reshape(2, 6))
    assert np.abs(output.logits - exact).mean() < 0.05 * np.abs(exact).mean()


def test_loading_errors_name_the_path(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/none: no such folder"):
        jaxllm.load_pretrained(tmp_path / "none")
    with pytest.raises(InputError, match="dtype 'float64': expected float32, bfloat16 or float16"):
        jaxllm.load_pretrained(tmp_path, dtype="float64")


def test_a_faulty_generation_config_is_named(tmp_path, lm):
    lm.save_pretrained(tmp_path / "made")
    path = tmp_path / "made/generation_config.json"
    path.write_text("{")
    with pytest.raises(InputError, match=str(path)):
        jaxllm.load_pretrained(tmp_path / "made")
    path.write_text(json.dumps({"eos_token_id": 5}))
    assert jaxllm.load_pretrained(tmp_path / "made").generation_config == {"eos_token_id": 5}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"positions": [[0, 0.5, 1, 2]]}, "positions must be integers, found float64"),
        ({"positions": [list("abcd")]}, "positions must be integers, found <U1"),
        ({"positions": [[0, 1, 2, 2**40]]}, "positions must be at most 16,777,216, found 1,099,511,627,776"),
        ({"mask": np.where(np.tril(np.ones((1, 4, 4))), 0.0, -1e9)}, "mask must hold True where a query may attend"),
        ({"block_positions": [[0, 1, 2, 3]]}, "this model has one position for each token"),
    ],
)
def test_positions_and_masks_that_mean_something_else_are_refused(lm, places, message):
    with pytest.raises(InputError, match=message):
        lm.logits([[1, 2, 3, 4]], **places)


@pytest.mark.parametrize("labels", [[[0.0, 1.5, 2.0, 3.0]], [[True, False, True, True]]])
def test_labels_are_integers(lm, labels):
    with pytest.raises(InputError, match="labels must be integers"):
        lm.loss_and_grads([[1, 2, 3, 4]], labels=np.array(labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_k": "5", "temperature": 1.0}, "top_k must be a finite number"),
        ({"eos_ids": 5}, "eos_ids must be a sequence of ids, found 5"),
        ({"seed": 2**70}, "seed must be an integer from 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
    ],
    ids=str,
)
def test_generation_options_of_another_kind_are_refused(lm, options, message):
    with pytest.raises(InputError, match=message):
        lm.generate([[1, 2, 3, 4]], **{"max_new_tokens": 2} | options)


def test_rows_of_different_lengths_are_refused(lm):
    with pytest.raises(InputError, match="rows of different lengths"):
        lm.logits([[1, 2], [3]])
