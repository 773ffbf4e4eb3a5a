"""Choosing a token: distributions against brute force, and what each setting rules out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.generate.sampling import Sampling, next_token, split_sampling

VOCAB, DRAWS = 9, 4000
LOGITS = np.array([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.4, -0.5, 8.0], np.float32)
# Subnormal numbers, and quotients that differ in the last bit alone, would test the device and not the rule.
on_a_grid = st.integers(-256, 256).map(lambda value: value / 64)
NUM_IDS = 8  # the last row of the table means no token, although its logit is the largest


@functools.partial(jax.jit, static_argnums=2)
def draw(logits, seen, kind, values):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.vmap(lambda key: next_token(logits[None], seen, key[None], kind, values)[0])(keys)


def frequencies(sampling, logits=LOGITS, seen=None):
    kind, values = split_sampling(sampling, NUM_IDS)
    seen = jnp.zeros((1, VOCAB), bool) if seen is None else seen
    return np.bincount(draw(jnp.asarray(logits), seen, kind, values), minlength=VOCAB) / DRAWS


def exact_distribution(temperature, top_k, top_p, logits=LOGITS):
    """Keep the top-k tokens, then among them the fewest that together reach top_p, and renormalise."""
    order = sorted(range(NUM_IDS), key=lambda token: -logits[token])[:top_k]
    weight = {token: np.exp(float(logits[token]) / temperature) for token in order}
    total = sum(weight.values())
    kept, mass = [], 0.0
    for token in order:
        if mass < (1.0 if top_p is None else top_p):
            kept.append(token)
        mass += weight[token] / total
    share = sum(weight[token] for token in kept)
    return np.array([weight[token] / share if token in kept else 0.0 for token in range(VOCAB)])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (3.0, 3, None),
        (1.0, None, 0.65),
        (2.0, 5, 0.7),
        (1.0, 1, 1.0),
        (1.0, 99, 1e-9),
    ],
)
def test_tokens_have_the_frequencies_of_the_definition(temperature, top_k, top_p):
    found = frequencies(Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    expected = exact_distribution(temperature, top_k, top_p)
    assert ((found > 0) <= (expected > 0)).all(), "a token that was ruled out came up"
    assert np.abs(found - expected).sum() < 0.06


def test_top_p_of_one_and_top_k_alone_rule_out_no_unlikely_token():
    """A running sum of float32 probabilities may reach 1 before the last token; what is off must not cut there."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 50_000)) * 0.01, jnp.float32)
    kind, values = split_sampling(Sampling(temperature=1.0, top_k=50_000), 50_000)
    tokens = jax.jit(lambda keys: jax.vmap(lambda key: next_token(logits, None, key[None], kind, values)[0])(keys))(
        jax.random.split(jax.random.key(0), 50)
    )
    ranks = np.argsort(np.argsort(-np.asarray(logits[0])))[np.asarray(tokens)]
    assert ranks.max() > 45_000
    assert np.isinf(values.top_p)
    assert np.isinf(split_sampling(Sampling(temperature=1.0, top_p=1.0), 5)[1].top_p)


@given(logits=st.lists(on_a_grid, min_size=VOCAB, max_size=VOCAB))
def test_greedy_takes_the_largest_logit_that_means_a_token(logits):
    kind, values = split_sampling(Sampling(), NUM_IDS)
    token = greedy(jnp.array([logits], jnp.float32), kind, values)
    assert token.dtype == jnp.int32
    assert int(token[0]) == int(np.argmax(logits[:NUM_IDS]))


@functools.partial(jax.jit, static_argnums=1)
def greedy(logits, kind, values, seen=None):
    return next_token(logits, seen, jax.random.split(jax.random.key(0), 1), kind, values)


@given(
    logits=st.lists(on_a_grid, min_size=NUM_IDS, max_size=NUM_IDS),
    seen=st.lists(st.booleans(), min_size=NUM_IDS, max_size=NUM_IDS),
    penalty=st.sampled_from([0.5, 1.3717, 4.0]),
)
def test_repetition_penalty_is_the_published_one(logits, seen, penalty):
    """Seen tokens: positive logits are divided, negative ones multiplied (arXiv:1909.05858, as transformers does)."""
    kind, values = split_sampling(Sampling(repetition_penalty=penalty), NUM_IDS)
    rows = np.array([[*logits, 99.0]], np.float32), np.array([[*seen, True]])
    factor = np.float32(penalty)
    expected = [(x / factor if x > 0 else x * factor) if s else x for x, s in zip(rows[0][0], rows[1][0], strict=True)]
    token = greedy(jnp.asarray(rows[0]), kind, values, jnp.asarray(rows[1]))
    assert int(token[0]) == int(np.argmax(expected[:NUM_IDS]))


@pytest.mark.slow
def test_repetition_penalty_comes_before_temperature_and_filters():
    seen = np.zeros((1, VOCAB), bool)
    seen[0, [0, 1, 3]] = True
    found = frequencies(Sampling(temperature=2.0, top_k=3, repetition_penalty=3.5), seen=jnp.asarray(seen))
    penalised = np.where(seen[0], np.where(LOGITS > 0, LOGITS / 3.5, LOGITS * 3.5), LOGITS)
    expected = exact_distribution(2.0, 3, None, penalised)
    assert np.abs(found - expected).sum() < 0.06
    assert set(np.flatnonzero(found)) == {0, 2, 6}


def test_values_are_data_and_kinds_are_compiled():
    def kind(**fields):
        return split_sampling(Sampling(**fields), VOCAB)[0]

    assert kind(temperature=0.3, top_k=2) == kind(temperature=2.0, top_p=0.4, top_k=7)
    assert kind(temperature=0.3) != kind(temperature=0.0)
    assert kind(temperature=0.3, repetition_penalty=1.1) != kind(temperature=0.3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("repetition_penalty", 0.0)],
)
def test_nonsense_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field} must be .*, found {value}"):
        Sampling(**{field: value})
